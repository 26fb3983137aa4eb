"""Plain decoding: no drafts, no taps, no store, no link."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verifier_service.block_hashes import BlockHash
from verifier_service.proposers.face import ProposerState
from verifier_service.sequence import Progress, RunningRequest


class NoProposer:
    """A Proposer that never proposes and costs nothing."""

    tap_layers: tuple[int, ...] = ()

    def resting(self) -> bool:
        return True

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        """Nothing to do."""

    def collect(self) -> float:
        return 0.0

    def learn(self, progress: Sequence[Progress], prefilled: bool, seconds: float) -> None:
        """There is nothing to choose."""

    def forget(self, sequences: Sequence[RunningRequest]) -> None:
        """Nothing is held."""

    def evicted(self, hashes: Sequence[BlockHash]) -> None:
        """Nothing is kept."""

    def configure(self, max_draft_tokens: int | None, soft_deadline_s: float | None) -> None:
        """There is nothing to set."""

    def set_drafters(self, addresses: Sequence[str]) -> None:
        """No drafter is used."""

    def state(self) -> ProposerState:
        return ProposerState(linked=False, drafter_id="", epoch=0, counters={})

    def stop(self) -> None:
        """Nothing runs."""
