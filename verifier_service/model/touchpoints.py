"""Every place where Paceline touches transformers. Pinned to 5.23: many of these names carry removal notices.

What is relied on: the configuration and CausalLM classes; decoder layers that pass unknown keyword arguments on to
their attention (`step`); AttentionInterface; submodule names (`self_attn`, `linear_attn`, `mlp`); rotary modules;
the chunked gated delta rule, which uses fla's kernel on a GPU where that is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DeepseekV3Config, PretrainedConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from modeling.errors import CheckpointError
from modeling.target_config import TargetConfig
from verifier_service.model.attention import paged_attention
from verifier_service.model.sections import sectioned_attention
from verifier_service.model.step import Step

PAGED = "paceline_paged"
SECTIONED = "paceline_sectioned"
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the sequence's length

AttentionInterface.register(PAGED, paged_attention)
AttentionInterface.register(SECTIONED, sectioned_attention)

chunk_gated_delta_rule = torch_chunk_gated_delta_rule


def empty_model(target: TargetConfig, dtype: torch.dtype, attention: str = PAGED) -> nn.Module:
    """The text model's CausalLM class without storage (meta device). Nothing leaves the disk.

    attention: which function is plugged in, PAGED or SECTIONED.
    """
    config = _text_config(target)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in FIXED_ROPE:
        raise CheckpointError(
            f"{target.file}: rope_type {rope!r} is not supported; supported are {', '.join(FIXED_ROPE)}"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def text_shapes(target: TargetConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the text model's tensors, by name without the model's prefix; a tied head is none of them."""
    state = empty_model(target, torch.bfloat16).state_dict()
    if target.tied:
        state.pop("lm_head.weight", None)
    return {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in state.items()}


def _text_config(target: TargetConfig) -> PretrainedConfig:
    if target.model_type == "kimi_k2":  # known to transformers inside a multimodal checkpoint only
        return DeepseekV3Config.from_dict(dict(target.text))
    config = AutoConfig.from_pretrained(target.directory, local_files_only=True, trust_remote_code=False)
    return config.get_text_config()


def rotary(model: nn.Module, device: str | torch.device) -> nn.Module:
    """A rotary module with real frequencies: those of a meta model hold no values."""
    causal: Any = model
    with torch.device(device):
        return type(causal.model.rotary_emb)(causal.config)


def is_norm(module: nn.Module) -> bool:
    """RMSNorm over a vector; the gated one of DeltaNet is not."""
    return type(module).__name__.endswith("RMSNorm")


def norm_eps(module: Any) -> float:
    return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps


def is_attention_layer(layer: nn.Module) -> bool:
    return hasattr(layer, "self_attn")


def is_latent_attention(attention: nn.Module) -> bool:
    return hasattr(attention, "kv_lora_rank")


def is_sigmoid_router(router: nn.Module) -> bool:
    return hasattr(router, "e_score_correction_bias")


def is_moe(mlp: nn.Module) -> bool:
    return hasattr(mlp, "experts")


def is_gpt_oss_moe(mlp: nn.Module) -> bool:
    return hasattr(mlp, "router")


def has_sinks(attention: nn.Module) -> bool:
    return hasattr(attention, "sinks")


def sliding_window(attention: nn.Module) -> int | None:
    """In tokens, the row's own included; None: the layer sees everything."""
    return getattr(attention, "sliding_window", None)


def set_activation(mlp: Any, wrapped: Callable[[Callable], Callable]) -> None:
    """Replace a dense block's activation by what `wrapped` makes of it."""
    if hasattr(mlp, "act_fn"):
        mlp.act_fn = wrapped(mlp.act_fn)


def has_output_gate(attention: Any) -> bool:
    """Whether each query head's projection is followed by that of a gate for its output."""
    return attention.q_proj.out_features == 2 * attention.o_proj.in_features


def has_head_norms(attention: nn.Module) -> bool:
    return hasattr(attention, "q_norm")


def is_plain_silu_mlp(mlp: Any) -> bool:
    """down(silu(gate) up), without biases."""
    return mlp.config.hidden_act == "silu" and mlp.gate_proj.bias is None


def gives_half_of_rotary(rotary: nn.Module) -> bool:
    """gpt-oss's cosines and sines are those of one half of the rotary dimensions; the other half's are the same."""
    return type(rotary).__name__.startswith("GptOss")


def has_interleaved_projections(delta_net: nn.Module) -> bool:
    return hasattr(delta_net, "in_proj_qkvz")


class ScoredMlp(nn.Module):
    """gpt-oss's decoder layer expects the router's scores beside its block's output; nobody reads them."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.mlp(hidden), None


def run_layer(
    layer: nn.Module, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step
) -> torch.Tensor:
    """One decoder layer over [1, tokens, hidden]; the step reaches attention and DeltaNet as a keyword."""
    return layer(hidden, position_embeddings=rope, attention_mask=None, step=step)
