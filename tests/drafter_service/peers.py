"""A verifier as the engine sees it, and what tests ask of an engine without a thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from cluster.link.messages import Draft, DraftAnswer, DraftAsk, Mark
from drafter_service.engine import DrafterEngine
from tests.drafter_service.pairs import BLOCK, HIDDEN

WAIT_S = 20.0
CONTEXT = 24  # features that most tests give a context


class RecordingPeer:
    """Keeps what it is told. frames: answers as they came together. hold: `ack` waits here while it is cleared."""

    def __init__(self, link_id: str = "link") -> None:
        self.link_id = link_id
        self.frames: list[list[DraftAnswer]] = []
        self.acks: list[tuple[str, int]] = []
        self.gone: list[str] = []
        self.not_shared: list[str] = []
        self.acked = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        self._changed = threading.Condition()

    def answer(self, answers: Sequence[DraftAnswer]) -> None:
        with self._changed:
            self.frames.append(list(answers))
            self._changed.notify_all()

    def ack(self, marks: Sequence[Mark]) -> None:
        self.acks += [(mark.context_id, mark.watermark) for mark in marks]
        self.acked.set()
        assert self.hold.wait(WAIT_S)

    def evicted(self, context_id: str) -> None:
        self.gone.append(context_id)

    def unshared(self, context_id: str) -> None:
        self.not_shared.append(context_id)

    @property
    def answers(self) -> list[DraftAnswer]:
        return [answer for frame in self.frames for answer in frame]

    def wait_for(self, count: int) -> list[DraftAnswer]:
        """The answers, once there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.answers) >= count, WAIT_S), f"only {len(self.answers)} came"
            return self.answers


def features(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def ask_for(
    engine: DrafterEngine, peer: RecordingPeer, context_id: str, base: int, bonus: int = 7, rows: int = BLOCK - 1
) -> DraftAnswer:
    engine.draft(peer, Draft((DraftAsk(context_id, base, bonus, rows),)))
    answer = peer.answers[-1]
    assert (answer.context_id, answer.base) == (context_id, base)
    return answer


def drafted_once(engine: DrafterEngine, peer: RecordingPeer, rows: torch.Tensor, start: int = 0) -> DraftAnswer:
    """What a fresh context with these features, appended at once, gets drafted."""
    engine.append(peer, "at once", start, rows)
    answer = ask_for(engine, peer, "at once", start + len(rows))
    engine.close_contexts(peer, ["at once"])
    return answer


def assert_same(one: DraftAnswer, other: DraftAnswer) -> None:
    assert one.token_ids == other.token_ids
    assert one.confidence == pytest.approx(other.confidence, rel=1e-4)
