"""A target and drafter with random weights that fit each other, for integration tests without the shipped pair."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig

from models.build.tokenizer import CHAT_TEMPLATE, SPECIAL

TAPS = (0, 2)
HIDDEN, HEAD, HEADS, KV_HEADS, WIDTH, DRAFT_LAYERS, BLOCK = 64, 16, 4, 2, 96, 2, 8


def build_pair(directory: Path) -> tuple[Path, Path]:
    """Seeded checkpoints directory/target and directory/drafter, as on a hub: config, weights, tokenizer."""
    target, drafter = directory / "target", directory / "drafter"
    vocabulary = _tokenizer(target)
    _target(target, vocabulary)
    _drafter(drafter, vocabulary)
    return target, drafter


def _tokenizer(out: Path) -> int:
    """Bytes and the special tokens, nothing merged; its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    out.mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "mask_token": SPECIAL[3],
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(SPECIAL) + len(alphabet)


def _target(out: Path, vocabulary: int) -> None:
    config = Qwen3_5MoeTextConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.1, generator=generator)
    model.tie_weights()
    model.save_pretrained(out)


def _drafter(out: Path, vocabulary: int) -> None:
    out.mkdir(parents=True)
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": DRAFT_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "intermediate_size": WIDTH,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "vocab_size": vocabulary,
        "num_target_layers": 4,
        "block_size": BLOCK,
        "layer_types": ["full_attention"] * DRAFT_LAYERS,
        "dflash_config": {"target_layer_ids": list(TAPS), "mask_token_id": 3},
        "dtype": "float32",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(8)
    shapes = {"fc.weight": (HIDDEN, HIDDEN * len(TAPS)), "hidden_norm.weight": (HIDDEN,), "norm.weight": (HIDDEN,)}
    for layer in range(DRAFT_LAYERS):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in _LAYER_SHAPES.items()}
    weights = {
        name: torch.randn(shape, generator=generator) * 0.1 if len(shape) == 2 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    save_file(weights, out / "model.safetensors")


_LAYER_SHAPES: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
    "self_attn.q_norm.weight": (HEAD,),
    "self_attn.k_norm.weight": (HEAD,),
    "mlp.gate_proj.weight": (WIDTH, HIDDEN),
    "mlp.up_proj.weight": (WIDTH, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, WIDTH),
}
