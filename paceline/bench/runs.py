"""The values of an engine benchmark: what one decoder did with all prompts once, and what a decoder is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Output:
    """token_ids: generated, a stop token included. commits: tokens of each decode step, the prefill's token apart."""

    token_ids: tuple[int, ...]
    commits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """All prompts once at one concurrency. seconds: wall clock. outputs: in the prompts' order.

    draft_seconds of step_seconds were spent waiting for drafts; gap_share: of step_seconds, what lay between the end of
    a forward and the beginning of the next; link_bytes were sent for the features of context_tokens tokens, control
    frames included. None = not applicable to this decoder.
    """

    seconds: float
    outputs: tuple[Output, ...]
    draft_seconds: float | None = None
    step_seconds: float | None = None
    gap_share: float | None = None
    link_bytes: float | None = None
    context_tokens: float | None = None

    @property
    def tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def texts(self) -> tuple[tuple[int, ...], ...]:
        return tuple(output.token_ids for output in self.outputs)


class Decoder(Protocol):
    """One row of the table. Idle between runs."""

    name: str
    note: str

    def run(self, prompts: Sequence[tuple[int, ...]], concurrency: int, max_tokens: int) -> Run: ...
