"""A step's logits on rank 0: of all its rows, or of those alone that it asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from verifier_service.plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepLogits:
    """values: float32 [rows kept, vocabulary]. places: where in them a request's first row is, if not all are kept."""

    values: torch.Tensor
    places: Mapping[int, int] | None = None

    def place(self, row: int) -> int:
        return row if self.places is None else self.places[row]


def step_logits(plan: StepPlan, logits: torch.Tensor | None) -> StepLogits | None:
    """logits: as its forward returns them."""
    if logits is None:
        return None
    if plan.draws is None:
        return StepLogits(logits)
    places, at = {}, 0
    for rows in plan.shown:
        places[rows.row] = at
        at += rows.count
    return StepLogits(logits, places)
