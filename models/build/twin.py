"""A Qwen3 target with as many parameters as a given one and random weights: for peers that serve dense models only.

Speed does not depend on what the weights say. The tokenizer is the given target's, and the shapes that a drafter must
fit (hidden size, layers, vocabulary) are too.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from modeling.families import shard_map
from modeling.footprint import held_parts, storage_of
from modeling.target_config import TargetConfig, read_target_config
from verifier_service.model.touchpoints import text_shapes

SPREAD = 0.05  # of the weights: text of some variety
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_twin(target: Path, out: Path, seed: int = 0) -> int:
    """Write the checkpoint of `target`'s twin to `out`; return its parameters."""
    given = read_target_config(target)
    config = twin_config(given, parameters(given))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, SPREAD)
    model.to(torch.bfloat16).save_pretrained(out)
    for name in TOKENIZER:
        if (target / name).is_file():
            shutil.copyfile(target / name, out / name)
    return sum(parameter.numel() for parameter in model.parameters())


def twin_config(given: TargetConfig, wanted: int) -> Qwen3Config:
    """As wide and deep as `given`; the MLP takes what is left of `wanted` parameters."""
    hidden, heads = given.hidden, given.integer("num_attention_heads")
    kv_heads, dim = given.integer("num_key_value_heads", heads), given.integer("head_dim", hidden // heads)
    embeddings = given.vocabulary * hidden * (1 if given.tied else 2)
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    width = (wanted - embeddings - given.layers * attention) // (given.layers * 3 * hidden)
    if width < 1:
        raise ValueError(f"{given.directory} has {wanted} parameters: too few for Qwen3's attention at that width")
    return Qwen3Config(
        vocab_size=given.vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=given.layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=given.max_context,
        tie_word_embeddings=given.tied,
        eos_token_id=given.text.get("eos_token_id"),
        pad_token_id=given.text.get("pad_token_id"),
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def parameters(given: TargetConfig) -> int:
    return sum(part.parameters for part in held_parts(text_shapes(given), shard_map(given, 1), 1, storage_of(None, 2)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--target", type=Path, default=Path("models/tiny/target"))
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    count = write_twin(arguments.target, arguments.out, arguments.seed)
    print(
        f"{arguments.out}: Qwen3, {count:,} parameters (of {arguments.target}: "
        f"{parameters(read_target_config(arguments.target)):,})"
    )


if __name__ == "__main__":
    main()
