"""Builds one rank's model: transformers' modules, their tensors replaced by this rank's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling.families import Family
from modeling.moe import SharedExpert, SparseMoe
from modeling.norms import FusedRMSNorm
from modeling.parallel import ColumnParallelLinear, RankGroup, RowParallelLinear, VocabularyHead
from modeling.routing import SoftmaxTopK
from modeling.weights import RankWeights
from verifier_service.model import touchpoints
from verifier_service.model.gated_delta_net import DeltaNetWeights, RaggedGatedDeltaNet


@dataclass(frozen=True)
class RankModel:
    """One rank's modules, ready to run. kv_shapes: (kv_heads, head_dim) by attention layer.

    One copy of every weight is held, save for a tied head that is packed: its rows of the embedding are held as well.
    """

    embedding: torch.Tensor  # [vocabulary, hidden], replicated: a vocabulary-parallel one would cost an all-reduce
    layers: tuple[nn.Module, ...]
    norm: nn.Module
    head: VocabularyHead
    rotary: nn.Module
    kv_shapes: dict[int, tuple[int, int]]
    recurrent: tuple[RaggedGatedDeltaNet, ...]


def load_rank(empty: nn.Module, weights: RankWeights, family: Family, ranks: RankGroup) -> RankModel:
    """Fill the meta model with this rank's tensors. Raises CheckpointError for a missing or misshapen one."""
    model: Any = empty
    body = model.model
    embedding = weights.take("embed_tokens.weight", tuple(body.embed_tokens.weight.shape))
    kv_shapes: dict[int, tuple[int, int]] = {}
    recurrent: list[RaggedGatedDeltaNet] = []
    for index, layer in enumerate(body.layers):
        prefix = f"layers.{index}."
        if touchpoints.is_moe(layer.mlp):
            layer.mlp = _moe(layer.mlp, f"{prefix}mlp.", weights, ranks)
        if not touchpoints.is_attention_layer(layer):
            layer.linear_attn = _delta_net(layer.linear_attn, f"{prefix}linear_attn.", weights, len(recurrent), ranks)
            recurrent.append(layer.linear_attn)
        _fill(layer, prefix, weights, family, ranks)
        if touchpoints.is_attention_layer(layer):
            attention = layer.self_attn
            kv_shapes[index] = (attention.k_proj.out_features // attention.head_dim, attention.head_dim)
    _fill(body, "", weights, family, ranks)
    return RankModel(
        embedding=embedding,
        layers=tuple(body.layers),
        norm=body.norm,
        head=VocabularyHead(_head(embedding, weights, ranks), weights.config.vocabulary, ranks),
        rotary=touchpoints.rotary(model, weights.device),
        kv_shapes=kv_shapes,
        recurrent=tuple(recurrent),
    )


def _fill(parent: nn.Module, prefix: str, weights: RankWeights, family: Family, ranks: RankGroup) -> None:
    """Give every linear and norm below `parent` its tensors; swap in parallel linears and fused norms."""
    for name, module in list(parent.named_children()):
        path = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList) or name == "rotary_emb":
            continue
        if isinstance(module, nn.Linear):
            setattr(parent, name, _linear(module, path, weights, ranks))
        elif touchpoints.is_norm(module):
            weight = weights.take(f"{path}.weight", tuple(module.weight.shape))  # type: ignore[arg-type]
            setattr(parent, name, FusedRMSNorm(weight, touchpoints.norm_eps(module), family.zero_centered_norms))
        elif not isinstance(module, nn.Embedding):
            _fill(module, f"{path}.", weights, family, ranks)


def _linear(module: nn.Linear, path: str, weights: RankWeights, ranks: RankGroup) -> nn.Module:
    weight = weights.take(f"{path}.weight", tuple(module.weight.shape))
    bias = None if module.bias is None else weights.take(f"{path}.bias", tuple(module.bias.shape))
    if weights.shards.of(f"{path}.weight").dim == 1:
        return RowParallelLinear(weight, bias, ranks)
    return ColumnParallelLinear(weight, bias)


def _delta_net(
    module: Any, prefix: str, weights: RankWeights, state_layer: int, ranks: RankGroup
) -> RaggedGatedDeltaNet:
    def take(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return weights.take(prefix + name, tuple(tensor.shape))

    return RaggedGatedDeltaNet(
        DeltaNetWeights(
            in_proj_qkv=take("in_proj_qkv.weight", module.in_proj_qkv.weight),
            in_proj_z=take("in_proj_z.weight", module.in_proj_z.weight),
            in_proj_b=take("in_proj_b.weight", module.in_proj_b.weight),
            in_proj_a=take("in_proj_a.weight", module.in_proj_a.weight),
            conv1d=take("conv1d.weight", module.conv1d.weight),
            A_log=take("A_log", module.A_log),
            dt_bias=take("dt_bias", module.dt_bias),
            norm=take("norm.weight", module.norm.weight),
            out_proj=take("out_proj.weight", module.out_proj.weight),
        ),
        state_layer=state_layer,
        key_dim=module.head_k_dim,
        value_dim=module.head_v_dim,
        norm_eps=module.norm.variance_epsilon,
        chunk_rule=touchpoints.chunk_gated_delta_rule,
        ranks=ranks,
    )


def _moe(block: Any, prefix: str, weights: RankWeights, ranks: RankGroup) -> SparseMoe:
    shared = None
    if hasattr(block, "shared_expert"):
        expert = block.shared_expert
        gate, up, down = (
            weights.take(f"{prefix}shared_expert.{name}.weight", tuple(getattr(expert, name).weight.shape))
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        gating = weights.take(f"{prefix}shared_expert_gate.weight", tuple(block.shared_expert_gate.weight.shape))
        shared = SharedExpert(gate_up=torch.cat([gate, up]), down=down, gate=gating)
    return SparseMoe(
        weights.take(f"{prefix}gate.weight", tuple(block.gate.weight.shape)),
        weights.take(f"{prefix}experts.gate_up_proj", tuple(block.experts.gate_up_proj.shape)),
        weights.take(f"{prefix}experts.down_proj", tuple(block.experts.down_proj.shape)),
        shared,
        route=SoftmaxTopK(block.gate.top_k, getattr(block.gate, "norm_topk_prob", True)),
        ranks=ranks,
    )


def _head(embedding: torch.Tensor, weights: RankWeights, ranks: RankGroup) -> torch.Tensor:
    if weights.layout.head is None:  # tied: the rank's rows of the embedding that it holds anyway
        start, stop = weights.shards.head.sections[0].part(ranks.rank, ranks.size)
        return embedding[start:stop]
    return weights.take("lm_head.weight", tuple(embedding.shape))
