"""Builds one rank's model: transformers' modules, their tensors replaced by this rank's parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeling.families import Family
from modeling.operations import Operations
from modeling.parallel import ColumnParallelLinear, RowParallelLinear, VocabularyHead
from modeling.quantized.packed import Weight
from modeling.ranks import RankGroup
from modeling.weights import RankWeights
from verifier_service.model import touchpoints
from verifier_service.model.forms import Forms
from verifier_service.model.gated_delta_net import DeltaNetWeights, RaggedGatedDeltaNet, split_by_part
from verifier_service.model.latent_attention import LatentAttention
from verifier_service.model.latent_shape import LatentShape
from verifier_service.model.moe_loading import load_moe


@dataclass(frozen=True)
class RankModel:
    """One rank's modules, ready to run.

    kv_shapes: (kv_heads, head_dim) by layer that caches keys and values, for this rank's heads; latent_shapes: (latent,
    rotary key) by layer that caches latents, which no rank can divide. windows: the sliding windows, in tokens, that
    some layers have; those layers keep what has left it.
    One copy of every weight is held, save for a tied head that is packed: its rows of the embedding are held as well.
    """

    embedding: torch.Tensor  # [vocabulary, hidden], replicated: a vocabulary-parallel one would cost an all-reduce
    layers: tuple[nn.Module, ...]
    norm: nn.Module
    head: VocabularyHead
    rotary: nn.Module
    kv_shapes: dict[int, tuple[int, int]]
    latent_shapes: dict[int, tuple[int, int]]
    windows: frozenset[int]
    recurrent: tuple[RaggedGatedDeltaNet, ...]


@dataclass(frozen=True)
class Parts:
    """What every module of one rank is made from."""

    weights: RankWeights
    family: Family
    ranks: RankGroup
    operations: Operations
    forms: Forms


@dataclass(frozen=True)
class MadeLayer:
    """One decoder layer with its tensors. cached: (kv_heads, head_dim), or (latent, rotary key) if `latent`, of a layer
    that attends; window: of its attention; recurrent: the layer's Gated DeltaNet.
    """

    module: nn.Module
    cached: tuple[int, int] | None = None
    latent: bool = False
    window: int | None = None
    recurrent: RaggedGatedDeltaNet | None = None


# (transformers' layer on the meta device, its index, how many recurrent layers came before it, parts) -> the layer
MakeLayer = Callable[[Any, int, int, Parts], MadeLayer]
# (transformers' norm, its path, parts) -> the norm
MakeNorm = Callable[[Any, str, Parts], nn.Module]


def load_rank(
    empty: nn.Module,
    weights: RankWeights,
    family: Family,
    ranks: RankGroup,
    operations: Operations,
    forms: Forms,
    make_layer: MakeLayer | None = None,
    make_norm: MakeNorm | None = None,
) -> RankModel:
    """Fill the meta model, made for `forms`, with this rank's tensors.

    make_layer, make_norm: None for transformers' layers over `forms` and `operations`. Raises CheckpointError for a
    missing, extra or misshapen tensor.
    """
    model: Any = empty
    body = model.model
    parts = Parts(weights, family, ranks, operations, forms)
    embedding = weights.take("embed_tokens.weight", tuple(body.embed_tokens.weight.shape))
    made: list[MadeLayer] = []
    recurrent: list[RaggedGatedDeltaNet] = []
    for index, layer in enumerate(body.layers):
        made.append((make_layer or stock_layer)(layer, index, len(recurrent), parts))
        if (own := made[-1].recurrent) is not None:
            recurrent.append(own)
    norm = (make_norm or load_norm)(body.norm, "norm", parts)
    head = VocabularyHead(_head(embedding, weights, ranks), weights.config.vocabulary, ranks, operations)
    weights.finish()
    cached = [(index, layer.cached, layer.latent) for index, layer in enumerate(made) if layer.cached is not None]
    return RankModel(
        embedding=embedding,
        layers=tuple(layer.module for layer in made),
        norm=norm,
        head=head,
        rotary=touchpoints.rotary(model, weights.device),
        kv_shapes={index: shape for index, shape, latent in cached if not latent},
        latent_shapes={index: shape for index, shape, latent in cached if latent},
        windows=frozenset(layer.window for layer in made if layer.window is not None),
        recurrent=tuple(recurrent),
    )


def stock_layer(layer: Any, index: int, state_layer: int, parts: Parts) -> MadeLayer:
    """transformers' decoder layer: its attention function, experts, DeltaNet, linears and norms are ours."""
    prefix = f"layers.{index}."
    if touchpoints.is_moe(layer.mlp):
        layer.mlp = load_moe(layer.mlp, f"{prefix}mlp.", parts.weights, parts.ranks, parts.operations)
    touchpoints.set_activation(layer.mlp, parts.operations.elementwise)
    if not touchpoints.is_attention_layer(layer):
        layer.linear_attn = parts.forms.delta_net(**delta_net_arguments(layer.linear_attn, index, state_layer, parts))
        _fill(layer, prefix, parts)
        return MadeLayer(layer, recurrent=layer.linear_attn)
    if touchpoints.is_latent_attention(layer.self_attn):
        layer.self_attn = load_latent_attention(layer.self_attn, index, parts, parts.forms.latent_attention, load_norm)
        shape = layer.self_attn.shape
        _fill(layer, prefix, parts)
        return MadeLayer(layer, (shape.latent, shape.rotary), latent=True)
    _fill(layer, prefix, parts)
    attention = layer.self_attn
    if touchpoints.has_sinks(attention):
        attention.sinks = nn.Parameter(load_sinks(attention, prefix, parts), requires_grad=False)
    layer.self_attn = parts.forms.around(attention)
    cached = attention.k_proj.out_features // attention.head_dim, attention.head_dim
    return MadeLayer(layer, cached, window=touchpoints.sliding_window(attention))


def load_sinks(attention: Any, prefix: str, parts: Parts) -> torch.Tensor:
    return parts.weights.take(f"{prefix}self_attn.sinks", tuple(attention.sinks.shape))


def _fill(parent: nn.Module, prefix: str, parts: Parts) -> None:
    """Give every linear and norm below `parent` its tensors; swap in parallel linears and fused norms."""
    for name, module in list(parent.named_children()):
        path = f"{prefix}{name}"
        if isinstance(module, (nn.ModuleList, LatentAttention)) or name == "rotary_emb":
            continue
        if isinstance(module, nn.Linear):
            setattr(parent, name, load_linear(module, path, parts))
        elif touchpoints.is_norm(module):
            setattr(parent, name, load_norm(module, path, parts))
        elif not isinstance(module, nn.Embedding):
            _fill(module, f"{path}.", parts)


def load_linear(module: nn.Linear, path: str, parts: Parts) -> ColumnParallelLinear | RowParallelLinear:
    weights = parts.weights
    weight = weights.take_matrix(f"{path}.weight", tuple(module.weight.shape))
    bias = None if module.bias is None else weights.take(f"{path}.bias", tuple(module.bias.shape))
    if weights.shards.of(f"{path}.weight").dim == 1:
        return RowParallelLinear(weight, bias, parts.ranks, parts.operations)
    return ColumnParallelLinear(weight, bias, parts.operations)


def load_norm(module: Any, path: str, parts: Parts) -> nn.Module:
    weight = parts.weights.take(f"{path}.weight", tuple(module.weight.shape))
    return parts.operations.norm(weight, touchpoints.norm_eps(module), parts.family.zero_centered_norms)


def load_latent_attention(
    module: Any, layer: int, parts: Parts, make: type[LatentAttention], make_norm: MakeNorm
) -> LatentAttention:
    """Of transformers' module in layer `layer`."""
    prefix = f"layers.{layer}.self_attn."

    def linear(name: str) -> nn.Module:
        return load_linear(getattr(module, name), prefix + name, parts)

    def norm(name: str) -> nn.Module:
        return make_norm(getattr(module, name), prefix + name, parts)

    low_rank = module.q_lora_rank is not None
    return make(
        nn.Sequential(linear("q_a_proj"), norm("q_a_layernorm"), linear("q_b_proj")) if low_rank else linear("q_proj"),
        linear("kv_a_proj_with_mqa"),
        norm("kv_a_layernorm"),
        # Plain even where a checkpoint has it packed: it is divided by head. In bf16 Kimi's take 17 MB a layer in all.
        parts.weights.take(f"{prefix}kv_b_proj.weight", tuple(module.kv_b_proj.weight.shape)),
        linear("o_proj"),
        layer=layer,
        shape=LatentShape(
            heads=module.num_heads // parts.ranks.size,
            content=module.qk_nope_head_dim,
            rotary=module.qk_rope_head_dim,
            value=module.v_head_dim,
            latent=module.kv_lora_rank,
        ),
        scaling=module.scaling,  # with the square of yarn's mscale
        interleaved=module.config.rope_interleave,
    )


def delta_net_arguments(module: Any, index: int, state_layer: int, parts: Parts) -> dict[str, Any]:
    """What RaggedGatedDeltaNet takes, of transformers' module in layer `index`."""
    weights, prefix = parts.weights, f"layers.{index}.linear_attn."

    def take(name: str) -> torch.Tensor:
        return weights.take(prefix + name, tuple(module.get_parameter(name).shape))

    def matrix(name: str) -> Weight:
        return weights.take_matrix(prefix + name, tuple(module.get_parameter(name).shape))

    qkv: Weight
    z: Weight
    b: Weight
    a: Weight
    if touchpoints.has_interleaved_projections(module):  # rows change places: kept dequantized if they were packed
        qkvz, ba = take("in_proj_qkvz.weight"), take("in_proj_ba.weight")
        qkv, z, b, a = split_by_part(qkvz, ba, module.num_k_heads // parts.ranks.size, module.head_k_dim)
    else:
        qkv, z, b, a = (matrix(f"in_proj_{part}.weight") for part in ("qkv", "z", "b", "a"))
    return {
        "weights": DeltaNetWeights(
            in_proj_qkv=qkv,
            in_proj_z=z,
            in_proj_b=b,
            in_proj_a=a,
            conv1d=take("conv1d.weight"),
            A_log=take("A_log"),
            dt_bias=take("dt_bias"),
            norm=take("norm.weight"),
            out_proj=matrix("out_proj.weight"),
        ),
        "state_layer": state_layer,
        "key_dim": module.head_k_dim,
        "value_dim": module.head_v_dim,
        "norm_eps": module.norm.variance_epsilon,
        "chunk_rule": touchpoints.chunk_gated_delta_rule,
        "ranks": parts.ranks,
        "operations": parts.operations,
    }


def _head(embedding: torch.Tensor, weights: RankWeights, ranks: RankGroup) -> Weight:
    if weights.layout.head is None:  # tied: the rank's rows of the embedding that it holds anyway
        start, stop = weights.shards.head.sections[0].part(ranks.rank, ranks.size)
        return embedding[start:stop]
    return weights.take_matrix("lm_head.weight", tuple(embedding.shape))
