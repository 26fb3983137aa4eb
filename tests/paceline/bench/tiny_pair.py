"""A random Qwen3 target with a byte-level tokenizer and a random DFlash drafter for it, as checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from drafter_service.model import DFlashModel
from modeling.dflash import DFlashConfig

VOCABULARY = 260  # 256 bytes and four special tokens
END, PADDING, MASK = 256, 257, 258
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def write_pair(directory: Path) -> tuple[Path, Path]:
    """Directories of the target and of the drafter, seeded."""
    target, drafter = directory / "target", directory / "drafter"
    _write_target(target)
    _write_drafter(drafter)
    return target, drafter


def _write_target(directory: Path) -> None:
    torch.manual_seed(3)
    config = Qwen3Config(
        **SHAPE,
        num_hidden_layers=3,
        eos_token_id=END,
        pad_token_id=PADDING,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(directory)
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>", "<|mask|>", "<|unused|>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", mask_token="<|mask|>"
    ).save_pretrained(directory)


def _write_drafter(directory: Path) -> None:
    directory.mkdir(parents=True)
    raw = {
        **SHAPE,
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_target_layers": 3,
        "block_size": 4,
        "dflash_config": {"target_layer_ids": [0, 2], "mask_token_id": MASK},
    }
    (directory / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(4)
    model = DFlashModel(DFlashConfig.load(directory))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    save_file(model.state_dict(), directory / "model.safetensors")
