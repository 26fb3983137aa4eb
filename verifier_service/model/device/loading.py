"""One rank's decoder layers over kernels, from transformers' modules and this rank's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modeling.errors import CheckpointError
from modeling.parallel import RowParallelLinear
from modeling.quantized.packed import stacked_rows
from verifier_service.model import touchpoints
from verifier_service.model.device.attention import AttentionShape, KernelAttention
from verifier_service.model.device.forms import FAST, KernelForms
from verifier_service.model.device.layer import GatedMlp, KernelLayer
from verifier_service.model.device.norm import KernelNorm, LoneKernelNorm
from verifier_service.model.loading import (
    MadeLayer,
    Parts,
    delta_net_arguments,
    load_latent_attention,
    load_linear,
    load_sinks,
)
from verifier_service.model.moe_loading import load_moe


def kernel_layer(layer: Any, index: int, state_layer: int, parts: Parts, forms: KernelForms = FAST) -> MadeLayer:
    """A loading.MakeLayer. Raises CheckpointError for a layer that no kernel computes."""
    prefix = f"layers.{index}."
    norms = [
        kernel_norm(getattr(layer, name), prefix + name, parts)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    mlp = _mlp(layer.mlp, f"{prefix}mlp.", parts)
    if not touchpoints.is_attention_layer(layer):
        mixer = forms.delta_net(**delta_net_arguments(layer.linear_attn, index, state_layer, parts))
        return MadeLayer(KernelLayer(norms[0], mixer, norms[1], mlp), recurrent=mixer)
    if touchpoints.is_latent_attention(layer.self_attn):
        latent = load_latent_attention(layer.self_attn, index, parts, forms.latent_attention, _lone_norm)
        cached = latent.shape.latent, latent.shape.rotary
        return MadeLayer(KernelLayer(norms[0], latent, norms[1], mlp), cached, latent=True)
    attention = _attention(layer.self_attn, index, parts)
    shape = attention.shape
    made = KernelLayer(norms[0], attention, norms[1], mlp)
    return MadeLayer(made, (shape.kv_heads, shape.head_dim), window=shape.window)


def kernel_norm(module: Any, path: str, parts: Parts, make: type[KernelNorm] = KernelNorm) -> KernelNorm:
    weight = parts.weights.take(f"{path}.weight", tuple(module.weight.shape))
    return make(weight, touchpoints.norm_eps(module), parts.family.zero_centered_norms)


def _lone_norm(module: Any, path: str, parts: Parts) -> KernelNorm:
    return kernel_norm(module, path, parts, LoneKernelNorm)


def _attention(module: Any, index: int, parts: Parts) -> KernelAttention:
    prefix, weights = f"layers.{index}.self_attn.", parts.weights
    projections = [getattr(module, name) for name in ("q_proj", "k_proj", "v_proj")]
    names = [f"{prefix}{name}" for name in ("q_proj", "k_proj", "v_proj")]
    matrices = [
        weights.take_matrix(f"{name}.weight", tuple(linear.weight.shape)) for name, linear in zip(names, projections)
    ]
    biases = [
        weights.take(f"{name}.bias", tuple(linear.bias.shape))
        for name, linear in zip(names, projections)
        if linear.bias is not None
    ]
    output = load_linear(module.o_proj, f"{prefix}o_proj", parts)
    assert isinstance(output, RowParallelLinear), "the output projection is divided along its input"
    gated = touchpoints.has_output_gate(module)
    norms = None
    if touchpoints.has_head_norms(module):
        norms = (
            kernel_norm(module.q_norm, f"{prefix}q_norm", parts),
            kernel_norm(module.k_norm, f"{prefix}k_norm", parts),
        )
    return KernelAttention(
        stacked_rows(matrices),
        torch.cat(biases) if biases else None,
        output,
        layer=index,
        shape=AttentionShape(
            heads=matrices[0].shape[0] // module.head_dim // (2 if gated else 1),
            kv_heads=matrices[1].shape[0] // module.head_dim,
            head_dim=module.head_dim,
            scaling=module.scaling,
            window=touchpoints.sliding_window(module),
            gated=gated,
        ),
        norms=norms,
        sinks=load_sinks(module, f"layers.{index}.", parts) if touchpoints.has_sinks(module) else None,
        operations=parts.operations,
    )


def _mlp(module: Any, prefix: str, parts: Parts) -> nn.Module:
    if touchpoints.is_moe(module):
        loaded = load_moe(module, prefix, parts.weights, parts.ranks, parts.operations)
        return loaded.mlp if isinstance(loaded, touchpoints.ScoredMlp) else loaded
    if not touchpoints.is_plain_silu_mlp(module):
        raise CheckpointError(
            f"{prefix[:-1]}: hidden_act is {module.config.hidden_act!r} and there may be biases; kernels know 'silu' "
            "without biases only: set kernels to 'torch'"
        )
    gate, up = (
        parts.weights.take_matrix(f"{prefix}{name}.weight", tuple(getattr(module, name).weight.shape))
        for name in ("gate_proj", "up_proj")
    )
    down = load_linear(module.down_proj, f"{prefix}down_proj", parts)
    assert isinstance(down, RowParallelLinear), "the down projection is divided along its input"
    return GatedMlp(stacked_rows([gate, up]), down, parts.operations)
