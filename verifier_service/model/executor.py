"""What computes a plan on one rank, behind the runner's bookkeeping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from verifier_service.model.face import ForwardOutput
from verifier_service.plan import StepPlan


class Executor(Protocol):
    """Holds caches and states. checkpoints: of recurrent state, None for a target without; cache_bytes: of keys, values
    and latents.
    """

    checkpoints: int | None
    cache_bytes: int

    @property
    def counters(self) -> Mapping[str, float]:
        """Since the start: see face.Runner."""

    def execute(self, plan: StepPlan, taps: Sequence[int], taken: torch.Tensor | None) -> ForwardOutput:
        """All that a plan says, in its order. taps: layers whose outputs are returned, on rank 0.

        taken: int64 [rows of the step before's logits], the tokens taken there, for a plan that is `ahead`; else None.
        """
