"""The row `published`: the DFlash authors' own generation loop (PyPI `dflash`, an optional dependency).

It handles one request at a time and targets without recurrent state, so the row is there for Qwen3 targets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from paceline.bench.errors import BenchError
from paceline.bench.reference import Reference
from paceline.bench.runs import Output, Run

SUPPORTED = ("qwen3", "qwen3_moe")


def why_not(model_type: str) -> str | None:
    """The reason why there can be no such row for a target of this type here, or None."""
    if model_type not in SUPPORTED:
        return f"the loop is right for {' and '.join(SUPPORTED)} targets only; this one is {model_type}"
    if importlib.util.find_spec("dflash") is None:
        return "the package dflash is not installed: pip install 'paceline[reference]'"
    return None


class PublishedLoop:
    """Shares the target's weights with `reference`. Raises BenchError if the drafter cannot be loaded."""

    name = "published"
    note = "the DFlash authors' loop, one request at a time"

    def __init__(self, reference: Reference, drafter: Path, dtype: str, device: str, temperature: float):
        from dflash.model import DFlashDraftModel, dflash_generate

        try:
            loaded: Any = DFlashDraftModel.from_pretrained(
                drafter, dtype=getattr(torch, dtype), local_files_only=True, attn_implementation="sdpa"
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BenchError(f"--drafter {drafter} cannot be loaded by the package dflash: {error}") from error
        self._drafter: Any = loaded.to(device).eval().requires_grad_(False)
        self._generate, self._reference = dflash_generate, reference
        self._device, self._temperature = device, temperature

    def run(self, prompts: Sequence[tuple[int, ...]], concurrency: int, max_tokens: int) -> Run:
        started = perf_counter()
        outputs = tuple(self._one(prompt, max_tokens) for prompt in prompts)
        return Run(perf_counter() - started, outputs)

    def _one(self, prompt: tuple[int, ...], max_tokens: int) -> Output:
        """The loop's own statistics need CUDA: where each target step starts is read from its position ids."""
        starts: list[int] = []

        def note_start(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            starts.append(int(kwargs["position_ids"][0, 0]))

        hook = self._reference.model.register_forward_pre_hook(note_start, with_kwargs=True)
        try:
            made = self._generate(
                self._drafter,
                target=self._reference.model,
                input_ids=torch.tensor([prompt], device=self._device),
                max_new_tokens=max_tokens,
                stop_token_ids=sorted(self._reference.stop_token_ids) or None,
                temperature=self._temperature,
            )
        finally:
            hook.remove()
        token_ids = tuple(made[0].tolist()[len(prompt) :])
        return Output(token_ids, commits(starts, len(prompt), len(token_ids)))


def commits(starts: Sequence[int], prompt_tokens: int, generated: int) -> tuple[int, ...]:
    """starts: first position of each target step, the prefill's (0) first. The prefill's own token is not a step's."""
    ends = [*starts[2:], prompt_tokens + generated - 1]
    return tuple(end - start for start, end in zip(starts[1:], ends))
