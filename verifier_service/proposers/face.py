"""What stands between the engine and its drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from verifier_service.block_hashes import BlockHash
from verifier_service.sequence import Progress, RunningRequest


@dataclass(frozen=True)
class ProposerState:
    """For Status. linked: drafts can be asked for. counters: totals since the start."""

    linked: bool
    drafter_id: str
    epoch: int
    counters: dict[str, float]


class Proposer(Protocol):
    """Drafts for running requests. Called from the engine's thread, except for configure, set_drafters and state.

    A step calls advance as soon as it is known what was accepted, then does its own bookkeeping, then collect.
    """

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """Target layers whose outputs `advance` needs; empty = none."""

    def resting(self) -> bool:
        """Whether the step under way will not be drafted upon, so that the next can be planned before its outcome.

        A wrong answer costs speed only: drafts for a request that is under way are used where they still fit.
        """

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        """Take the step's outcome and start drafting. taps: [tokens of the step, taps x hidden]."""

    def collect(self) -> float:
        """Wait for drafts, no longer than is worthwhile, and set `drafts` of the requests that have some.

        Returns the seconds of this step that went into drafting: asking (a colocated drafter works then) and waiting.
        """

    def learn(self, progress: Sequence[Progress], prefilled: bool, seconds: float) -> None:
        """What the step has shown: its outcome, whether it held prefill, its seconds without drafting."""

    def forget(self, sequences: Sequence[RunningRequest]) -> None:
        """These requests are over."""

    def evicted(self, hashes: Sequence[BlockHash]) -> None:
        """These cached KV blocks are gone, and nothing kept beside them will be asked for."""

    def configure(self, max_draft_tokens: int | None, soft_deadline_s: float | None) -> None:
        """None leaves a setting as it is. Values are within the bounds of live_settings."""

    def set_drafters(self, addresses: Sequence[str]) -> None: ...

    def state(self) -> ProposerState: ...

    def stop(self) -> None: ...
