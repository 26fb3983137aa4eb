"""The tokens that the step before took, for a plan that was made before the host had seen them."""

from __future__ import annotations

import torch

from modeling.ranks import RankGroup
from verifier_service.plan import StepPlan


class TakenTokens:
    """int64 [rows of the last step's logits], on the device of every rank. Nothing here waits for a GPU."""

    def __init__(self, ranks: RankGroup, device: str | torch.device):
        self._ranks, self._device = ranks, device
        self._tokens = torch.empty(0, dtype=torch.long, device=device)
        self._known = True  # on every rank

    def put(self, tokens: torch.Tensor) -> None:
        """On rank 0: token ids, none below 0."""
        self._tokens, self._known = tokens, False

    def put_everywhere(self, tokens: torch.Tensor) -> None:
        """On every rank, the same: token ids, none below 0."""
        self._tokens, self._known = tokens, True

    def expect(self, plan: StepPlan) -> None:
        """On the other ranks: this one has been computed."""
        rows = sum(len(row.token_ids) for row in plan.verify) + sum(chunk.completes_prompt for chunk in plan.prefill)
        self._tokens, self._known = torch.empty(rows, dtype=torch.long, device=self._device), False

    def everywhere(self) -> torch.Tensor:
        """What rank 0 has. Collective."""
        if len(self._tokens) and not self._known:
            self._ranks.broadcast_(self._tokens)
        return self._tokens


def filled(token_ids: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """token_ids int64 [tokens] with taken[row] in place of every -1 - row."""
    if not len(taken):  # that step took none: it prefilled only
        return token_ids
    return torch.where(token_ids < 0, taken.index_select(0, (-1 - token_ids).clamp_(min=0)), token_ids)
