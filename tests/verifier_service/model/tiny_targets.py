"""Miniature targets with random weights, one per family, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

VOCABULARY = 250  # not a multiple of 4: an uneven vocabulary at four ranks
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
_DENSE: dict[str, Any] = {**_COMMON, "intermediate_size": 96, "num_hidden_layers": 3}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
_HYBRID: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
_YARN: dict[str, Any] = {  # as published, with a shorter beginning
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LATENT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_parameters": _YARN,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**{**_DENSE, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**{**_DENSE, "num_key_value_heads": 1}),
    "qwen3_moe": Qwen3MoeConfig(**_DENSE, **_EXPERTS, mlp_only_layers=[1], norm_topk_prob=True),
    "qwen3_5": Qwen3_5TextConfig(**_HYBRID, intermediate_size=96),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(**_HYBRID, **_EXPERTS, shared_expert_intermediate_size=48),
    "qwen3_next": Qwen3NextConfig(
        **{**_HYBRID, "linear_num_key_heads": 2},
        **_EXPERTS,
        shared_expert_intermediate_size=48,
        intermediate_size=96,
        mlp_only_layers=[1],
    ),
    "gpt_oss": GptOssConfig(
        **{**_COMMON, "num_hidden_layers": 3, "intermediate_size": 32, "num_local_experts": 8},
        num_experts_per_tok=2,
        sliding_window=6,
        swiglu_limit=0.3,  # so low that it matters here
        rope_parameters={**_YARN, "mscale": None, "mscale_all_dim": None, "rope_theta": 150000.0, "truncate": False},
        attention_bias=True,
    ),
    "deepseek_v3": DeepseekV3Config(**_LATENT),  # as Kimi is: one group of experts, long by yarn
}


def build(family: str, directory: Path, **overrides: Any) -> PreTrainedModel:
    """A seeded model of the family in float32, saved into `directory`."""
    model = make(family, **overrides)
    model.save_pretrained(directory, max_shard_size="200KB")  # several shards and an index
    return model


def make(family: str, **overrides: Any) -> PreTrainedModel:
    """A seeded model of the family in float32."""
    config = CONFIGS[family] if not overrides else type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **overrides})
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for what stays as transformers initialises it
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:  # between two low ranks more, or attention would be all but uniform
                parameter.normal_(0, 0.3 if "_b_proj" in name else 0.08, generator=generator)
            elif "sinks" in name:
                parameter.normal_(0, 2, generator=generator)
            elif "norm" in name or "bias" in name:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0, 0.1, generator=generator)
    model.tie_weights()
    return model
