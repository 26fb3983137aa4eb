"""Targets as small as their family allows, and short schedules: an interpreted kernel takes milliseconds a program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.schedules import (
    BLOCK_TOKENS,
    BLOCKS,
    SLOTS,
    PlannedStep,
    Reference,
    reference,
    schedule,
    sequences,
    worst_difference,
)
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.runner import TargetRunner

VOCABULARY = tiny_targets.VOCABULARY
LONGEST_ROW = 4
_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_value_head_dim": 16,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3": {**_SMALL, "layer_types": ["full_attention"] * 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3_5_moe": {**_SMALL, **_HYBRID},
    "deepseek_v3": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "gpt_oss": {**_SMALL, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
}


@dataclass(frozen=True)
class TinyTarget:
    """A checkpoint with a schedule of prompts, verifies and roll-backs, and what the stock forward says of them."""

    directory: Path
    steps: list[PlannedStep]
    expected: Reference

    def runner(self, kernels: str = "triton", **overrides: Any) -> TargetRunner:
        settings: dict[str, Any] = {
            "num_blocks": BLOCKS,
            "block_tokens": BLOCK_TOKENS,
            "num_slots": SLOTS,
            "dtype": torch.float32,
            "device": "cpu",
            "kernel_path": KernelPath(kernels, longest_row=LONGEST_ROW),  # type: ignore[arg-type]
        }
        return TargetRunner(self.directory, **{**settings, **overrides})

    def worst(self, runner: TargetRunner, taps: tuple[int, ...] = ()) -> tuple[float, float]:
        """Largest difference of logits and taps from the stock ones."""
        outputs = [runner.forward(step.plan) for step in self.steps]
        return worst_difference(outputs, self.steps, self.expected, taps)


def build(family: str, directory: Path, seed: int = 2, tokens: int = 13) -> TinyTarget:
    model = tiny_targets.build(family, directory, **OVERRIDES[family])
    texts = [text[: tokens + 3 * index] for index, text in enumerate(sequences(2, VOCABULARY, seed))]
    return TinyTarget(directory, schedule(texts, VOCABULARY, seed, longest_block=LONGEST_ROW), reference(model, texts))
