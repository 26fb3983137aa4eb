"""What the engine asks of one rank's model: the runner's face and the values that cross it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from verifier_service.plan import StepPlan


@dataclass(frozen=True)
class ModelShape:
    """Limits of the loaded target. layer count etc. stay inside the runner. kv_bytes_per_token: of this rank.

    checkpoints: of recurrent state, that a plan may name; None for a target without recurrent state. device: of what a
    forward returns. blocks: of the KV cache. draws: a plan may have draws.
    """

    vocabulary: int
    hidden: int
    max_context: int
    kv_bytes_per_token: int
    checkpoints: int | None = None
    device: str = "cpu"
    blocks: int = 0
    draws: bool = False


@dataclass(frozen=True)
class ForwardOutput:
    """Of one plan, rows in plan order (verify rows first, then prefill chunks).

    logits: float32 [verify tokens + completed prompts, vocabulary], verify tokens in order, then one row per
        chunk that completes its prompt; of a plan with draws, of those rows that are `shown`, in that order, None if
        none is. On rank 0 only, None elsewhere.
    tokens: int64 [verify tokens + completed prompts] on every rank, of a plan with draws: those taken there, -1 where
        the logits are not finite; of late rows any token. Not to be changed.
    taps: [all tokens of the plan, taps x hidden], on rank 0 only and only if the runner was built with taps.

    On a GPU it may still be computing them. They stay as they are until the forward after the next one.
    """

    logits: torch.Tensor | None
    taps: torch.Tensor | None
    tokens: torch.Tensor | None = None


class Runner(Protocol):
    """One rank's share of the target with paged KV and recurrent states; all ranks get the same plan."""

    shape: ModelShape

    def forward(self, plan: StepPlan) -> ForwardOutput:
        """Execute a plan, commit of `decided` included. Does not wait for a GPU."""

    def feed(self, tokens: torch.Tensor) -> None:
        """On rank 0, after a forward and before one whose plan is `ahead`: the tokens taken from its logits.

        int64 [verify tokens + completed prompts], on the runner's device, none below 0; not to be changed any more. A
        plan with draws needs none, but for late rows.
        """

    def counters(self) -> Mapping[str, float]:
        """Since the start. Over kernels: graph_rows and graph_padding_rows, of steps in buckets; eager_steps, launched
        kernel by kernel; graph_failures, buckets whose CUDA graph could not be captured.
        """

    def set_taps(self, layer_ids: Sequence[int]) -> None:
        """0-based layer outputs to return as taps; empty = none (plain decoding pays nothing for taps)."""
