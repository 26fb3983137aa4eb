"""Builds one rank's model: transformers' modules, their tensors replaced by this rank's parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling.families import Family
from modeling.moe import Route, SharedExpert, SparseMoe
from modeling.norms import FusedRMSNorm
from modeling.parallel import ColumnParallelLinear, RankGroup, RowParallelLinear, VocabularyHead
from modeling.routing import SigmoidTopK, SoftmaxTopK
from modeling.weights import RankWeights
from verifier_service.model import touchpoints
from verifier_service.model.gated_delta_net import DeltaNetWeights, RaggedGatedDeltaNet
from verifier_service.model.latent_attention import LatentAttention, LatentShape


@dataclass(frozen=True)
class RankModel:
    """One rank's modules, ready to run.

    kv_shapes: (kv_heads, head_dim) by layer that caches keys and values, for this rank's heads; latent_widths: by layer
    that caches latents, which no rank can divide.
    One copy of every weight is held, save for a tied head that is packed: its rows of the embedding are held as well.
    """

    embedding: torch.Tensor  # [vocabulary, hidden], replicated: a vocabulary-parallel one would cost an all-reduce
    layers: tuple[nn.Module, ...]
    norm: nn.Module
    head: VocabularyHead
    rotary: nn.Module
    kv_shapes: dict[int, tuple[int, int]]
    latent_widths: dict[int, int]
    recurrent: tuple[RaggedGatedDeltaNet, ...]

    @property
    def kv_values_per_token(self) -> int:
        """Cached by this rank for one token, over all layers. Latents count in full on every rank."""
        return sum(2 * heads * dim for heads, dim in self.kv_shapes.values()) + sum(self.latent_widths.values())


def load_rank(empty: nn.Module, weights: RankWeights, family: Family, ranks: RankGroup) -> RankModel:
    """Fill the meta model with this rank's tensors. Raises CheckpointError for a missing or misshapen one."""
    model: Any = empty
    body = model.model
    embedding = weights.take("embed_tokens.weight", tuple(body.embed_tokens.weight.shape))
    kv_shapes: dict[int, tuple[int, int]] = {}
    latent_widths: dict[int, int] = {}
    recurrent: list[RaggedGatedDeltaNet] = []
    for index, layer in enumerate(body.layers):
        prefix = f"layers.{index}."
        if touchpoints.is_moe(layer.mlp):
            layer.mlp = _moe(layer.mlp, f"{prefix}mlp.", weights, ranks)
        if not touchpoints.is_attention_layer(layer):
            layer.linear_attn = _delta_net(layer.linear_attn, f"{prefix}linear_attn.", weights, len(recurrent), ranks)
            recurrent.append(layer.linear_attn)
        elif touchpoints.is_latent_attention(layer.self_attn):
            layer.self_attn = _latent_attention(layer.self_attn, f"{prefix}self_attn.", index, weights, family, ranks)
            latent_widths[index] = layer.self_attn.shape.cached
        _fill(layer, prefix, weights, family, ranks)
        if touchpoints.is_attention_layer(layer) and index not in latent_widths:
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
        latent_widths=latent_widths,
        recurrent=tuple(recurrent),
    )


def _fill(parent: nn.Module, prefix: str, weights: RankWeights, family: Family, ranks: RankGroup) -> None:
    """Give every linear and norm below `parent` its tensors; swap in parallel linears and fused norms."""
    for name, module in list(parent.named_children()):
        path = f"{prefix}{name}"
        if isinstance(module, (nn.ModuleList, LatentAttention)) or name == "rotary_emb":
            continue
        if isinstance(module, nn.Linear):
            setattr(parent, name, _linear(module, path, weights, ranks))
        elif touchpoints.is_norm(module):
            setattr(parent, name, _norm(module, path, weights, family))
        elif not isinstance(module, nn.Embedding):
            _fill(module, f"{path}.", weights, family, ranks)


def _linear(module: nn.Linear, path: str, weights: RankWeights, ranks: RankGroup) -> nn.Module:
    weight = weights.take(f"{path}.weight", tuple(module.weight.shape))
    bias = None if module.bias is None else weights.take(f"{path}.bias", tuple(module.bias.shape))
    if weights.shards.of(f"{path}.weight").dim == 1:
        return RowParallelLinear(weight, bias, ranks)
    return ColumnParallelLinear(weight, bias)


def _norm(module: Any, path: str, weights: RankWeights, family: Family) -> FusedRMSNorm:
    weight = weights.take(f"{path}.weight", tuple(module.weight.shape))
    return FusedRMSNorm(weight, touchpoints.norm_eps(module), family.zero_centered_norms)


def _latent_attention(
    module: Any, prefix: str, layer: int, weights: RankWeights, family: Family, ranks: RankGroup
) -> LatentAttention:
    def linear(name: str) -> nn.Module:
        return _linear(getattr(module, name), prefix + name, weights, ranks)

    def norm(name: str) -> nn.Module:
        return _norm(getattr(module, name), prefix + name, weights, family)

    low_rank = module.q_lora_rank is not None
    return LatentAttention(
        nn.Sequential(linear("q_a_proj"), norm("q_a_layernorm"), linear("q_b_proj")) if low_rank else linear("q_proj"),
        linear("kv_a_proj_with_mqa"),
        norm("kv_a_layernorm"),
        weights.take(f"{prefix}kv_b_proj.weight", tuple(module.kv_b_proj.weight.shape)),
        linear("o_proj"),
        layer=layer,
        shape=LatentShape(
            heads=module.num_heads // ranks.size,
            content=module.qk_nope_head_dim,
            rotary=module.qk_rope_head_dim,
            value=module.v_head_dim,
            latent=module.kv_lora_rank,
        ),
        scaling=module.scaling,  # with the square of yarn's mscale
        interleaved=module.config.rope_interleave,
    )


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
    router = weights.take(f"{prefix}gate.weight", tuple(block.gate.weight.shape))
    route: Route
    if touchpoints.is_sigmoid_router(block.gate):
        router = router.float()  # as the stock model does: scores of hundreds of experts lie close together
        correction = f"{prefix}gate.e_score_correction_bias"
        route = SigmoidTopK(
            weights.take(correction, (len(router),), torch.float32),
            top_k=block.gate.top_k,
            groups=block.gate.num_group,
            best_groups=block.gate.topk_group,
            normalized=block.gate.norm_topk_prob,
            scale=block.gate.routed_scaling_factor,
        )
    else:
        route = SoftmaxTopK(block.gate.top_k, getattr(block.gate, "norm_topk_prob", True))
    return SparseMoe(
        router,
        weights.take(f"{prefix}experts.gate_up_proj", tuple(block.experts.gate_up_proj.shape)),
        weights.take(f"{prefix}experts.down_proj", tuple(block.experts.down_proj.shape)),
        _shared_expert(block, prefix, weights),
        route=route,
        ranks=ranks,
    )


def _shared_expert(block: Any, prefix: str, weights: RankWeights) -> SharedExpert | None:
    name = next((name for name in ("shared_expert", "shared_experts") if hasattr(block, name)), None)
    if name is None:
        return None
    expert = getattr(block, name)
    gate, up, down = (
        weights.take(f"{prefix}{name}.{part}.weight", tuple(getattr(expert, part).weight.shape))
        for part in ("gate_proj", "up_proj", "down_proj")
    )
    gating = None
    if hasattr(block, "shared_expert_gate"):
        gating = weights.take(f"{prefix}shared_expert_gate.weight", tuple(block.shared_expert_gate.weight.shape))
    return SharedExpert(gate_up=torch.cat([gate, up]), down=down, gate=gating)


def _head(embedding: torch.Tensor, weights: RankWeights, ranks: RankGroup) -> torch.Tensor:
    if weights.layout.head is None:  # tied: the rank's rows of the embedding that it holds anyway
        start, stop = weights.shards.head.sections[0].part(ranks.rank, ranks.size)
        return embedding[start:stop]
    return weights.take("lm_head.weight", tuple(embedding.shape))
