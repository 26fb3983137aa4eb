"""Tiny random checkpoints on disk: a Qwen3 target and DFlash drafters that fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from drafter_service.config import DrafterSettings
from drafter_service.model import DFlashModel
from modeling.dflash import DFlashConfig

VOCABULARY, HIDDEN, TARGET_LAYERS, MAX_CONTEXT, BLOCK, MASK = 48, 32, 3, 256, 6, 3
FULL, SLIDING = "full_attention", "sliding_attention"

TAPS = (0, 2)


def second(**sizes: int) -> dict[str, Any]:
    """The changes of `draft_config` that make it DFlash 2; `sizes` differ from these."""
    own = {"conv_kernel_size": 2, "conv_group_size": 4, "selector_rank": 8, "selector_top_k": 5} | sizes
    return {
        "architectures": ["DFlash2DraftModel"],
        "dflash_config": {"target_layer_ids": list(TAPS), "mask_token_id": MASK, **own},
    }


def draft_config(**changes: Any) -> dict[str, Any]:
    """config.json of a drafter with two full-attention layers; `changes` replace or add keys (None removes one)."""
    raw: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 40,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": MAX_CONTEXT,
        "attention_bias": False,
        "vocab_size": VOCABULARY,
        "num_target_layers": TARGET_LAYERS,
        "block_size": BLOCK,
        "layer_types": [FULL, FULL],
        "dflash_config": {"target_layer_ids": list(TAPS), "mask_token_id": MASK},
    } | changes
    if SLIDING in (raw["layer_types"] or ()):
        raw["use_sliding_window"] = True
    return {key: value for key, value in raw.items() if value is not None}


def write_drafter(directory: Path, seed: int = 0, scale: float = 0.3, **changes: Any) -> Path:
    """A drafter checkpoint with random weights (norms around 1), in float32."""
    config = DFlashConfig.from_dict(draft_config(**changes), directory)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in DFlashModel(config).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = noise * scale if tensor.ndim == 2 or name.endswith("bias") else 1 + 0.2 * noise
    return write_checkpoint(directory, config.raw, weights)


def write_checkpoint(directory: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")
    return directory


def write_target(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A Qwen3 target with random weights, without a tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": TARGET_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": MAX_CONTEXT,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
    } | changes
    model = Qwen3ForCausalLM(Qwen3Config(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)  # the default initialisation is too small for tokens to depend on much
    model.save_pretrained(directory)
    return directory


def settings_for(target: Path, drafter: Path, **changes: Any) -> DrafterSettings:
    return DrafterSettings(
        checkpoint=str(drafter), target=str(target), **({"dtype": "float32", "device": "cpu"} | changes)
    )
