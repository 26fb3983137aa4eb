"""The engine's side of grammars: what a step does for the requests that have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from verifier_service.flight import SampledRows
from verifier_service.grammar.masks import NO_MASKS, MaskFiller, Masks
from verifier_service.sequence import Key, Progress, RunningRequest


class ConstrainedDecoding:
    """In a step: trim, plan, start_masks, forward, sample, commit, advance. Free while no request has a grammar."""

    def __init__(self, vocabulary: int):
        self._filler = MaskFiller(vocabulary)
        self._sequences: dict[Key, RunningRequest] = {}

    def add(self, sequence: RunningRequest) -> None:
        """A request whose shaping has a constraint."""
        self._sequences[sequence.key] = sequence

    def forget(self, sequence: RunningRequest) -> None:
        self._sequences.pop(sequence.key, None)

    def trim(self) -> None:
        """Cut drafts at the first that a grammar forbids, before any row is spent on them."""
        for sequence in self._sequences.values():
            if sequence.drafts:
                sequence.drafts = sequence.drafts[: sequence.shaping.constraint.allowed(sequence.drafts)]

    def start_masks(self, rows: Sequence[SampledRows]) -> Callable[[], Masks]:
        """Of the planned step. The call that comes back waits for them."""
        if not self._sequences:
            return _no_masks
        constrained = [each for each in rows if each.sequence.key in self._sequences]
        return self._filler.start(constrained) if constrained else _no_masks

    def advance(self, progress: Sequence[Progress]) -> list[Progress]:
        """Follow what was committed. Those that end by their grammar are changed to say so, and returned if the
        scheduler does not know yet that they are over."""
        if not self._sequences:
            return []
        ended = []
        for p in progress:
            if p.sequence.key in self._sequences and p.token_ids:
                was_over = p.finish is not None
                _advance(p)
                if p.finish is not None and not was_over:
                    ended.append(p)
        return ended

    def close(self) -> None:
        self._filler.close()


def _advance(p: Progress) -> None:
    constraint = p.sequence.shaping.constraint
    kept = constraint.take(p.token_ids[:-1] if p.finish == "stop" else p.token_ids)  # stop tokens are not its own
    if constraint.problem is not None:
        p.finish, p.error, kept = "error", constraint.problem, 0
    elif constraint.complete:
        p.finish = "stop"
    else:
        return
    p.token_ids = p.token_ids[:kept]
    p.accepted = min(p.accepted, kept)


def _no_masks() -> Masks:
    return NO_MASKS
