"""Features fused many steps at once are those fused step by step, wherever they are read, shared, dropped or sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import pytest
import torch

from cluster.contracts import EngineRequest
from tests.verifier_service.soak import Soak
from tests.verifier_service.test_linked import CheckedLink, TapFuser
from verifier_service.features import FeatureStore
from verifier_service.plan import StepPlan
from verifier_service.proposers.contexts import UNFUSED_ROWS, Contexts
from verifier_service.sequence import Progress, RunningRequest

WINDOW = 24
ROW_BYTES = 2 * 4


class CountingFuser(TapFuser):
    """Notes how many rows each call had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, taps: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(taps))
        return taps


class Side:
    """Contexts over a store of few pages and a link that checks what it is sent. eager: nothing waits to be fused."""

    def __init__(self, eager: bool, clock: Callable[[], float]):
        self.eager = eager
        self.link = CheckedLink(window=WINDOW, capacity=4)
        self.fuser = CountingFuser()
        self.store = FeatureStore(36 * 4 * ROW_BYTES, 4, 2)
        self.store._rows.zero_()
        self.contexts = Contexts(self.link, self.fuser, self.store, "v", WINDOW, clock)
        self.contexts.new_epoch(self.link.state)

    def take(self, progress: Sequence[Progress], taps: torch.Tensor, send: bool) -> None:
        self.contexts.take(self.contexts.of(progress), progress, taps, send)
        if self.eager:
            self.settle()
        if send:
            self.contexts.catch_up()

    def settle(self) -> None:
        if self.contexts._unfused.rows:
            self.contexts._fuse()

    def forget(self, sequences: Sequence[RunningRequest]) -> None:
        self.contexts.forget(sequences)

    def begin_epoch(self) -> None:
        self.link.begin_epoch()
        self.contexts.new_epoch(self.link.state)

    def turn_away(self, context_id: str) -> None:
        context = self.contexts.named(context_id)
        if context is not None:
            self.contexts.turned_away(context)


class RestingSoak(Soak):
    """A scheduler's life, told to both sides. Nothing is sent in most stretches of steps."""

    def __init__(self, seed: int, ahead: bool):
        super().__init__(seed, None, ahead=ahead)
        self.sides = [Side(eager, lambda: self.counts["events"] / 50) for eager in (False, True)]
        self.taps: deque[torch.Tensor | None] = deque()
        self.runner.set_taps([0])
        forward = self.runner.forward

        def noting(plan: StepPlan):
            output = forward(plan)
            self.taps.append(output.taps)
            return output

        self.runner.forward = noting  # type: ignore[method-assign]
        commit, take_evicted = self.scheduler.commit, self.scheduler.cache.take_evicted

        def committing(samples: Sequence[int]) -> list[Progress]:
            progress = commit(samples)
            self.advance(progress)
            return progress

        def evicting() -> list[bytes]:
            evicted = take_evicted()
            for side in self.sides:
                side.store.pages.forget_names(evicted)
            return evicted

        self.scheduler.commit = committing  # type: ignore[method-assign]
        self.scheduler.cache.take_evicted = evicting  # type: ignore[method-assign]

    def advance(self, progress: list[Progress]) -> None:
        taps = self.taps.popleft()
        if taps is None:
            return
        self.happen()
        send = self.counts["steps"] // 25 % 3 == 2
        for side in self.sides:
            side.take(progress, taps, send)
        lazy, eager = self.sides
        assert lazy.link.contexts == eager.link.contexts
        assert lazy.contexts._unfused.rows < UNFUSED_ROWS
        over = [p.sequence for p in progress if p.finish is not None]
        for side in self.sides:
            side.forget(over)

    def happen(self) -> None:
        """To the link: a new epoch, a full queue, a context that is turned away."""
        kind = self.random.random()
        full = 1 << 30 if self.random.random() < 0.1 else 0
        held = sorted(self.sides[0].link.contexts)
        lost = self.random.choice(held) if held else ""
        for side in self.sides:
            side.link.queued_bytes = full
            if kind < 0.02:
                side.begin_epoch()
            elif kind < 0.05 and lost:
                side.turn_away(lost)

    def _abort(self) -> None:
        before = {sequence.key: sequence for sequence in self.scheduler.requests()}
        super()._abort()
        for side in self.sides:
            side.forget([sequence for key, sequence in before.items() if key not in self.scheduler])

    def check(self) -> None:
        super().check()
        if self.random.random() < 0.02:
            self.compare()

    def compare(self) -> None:
        lazy, eager = self.sides
        assert [vars_of(t) for t in lazy.store.pages._tables.values()] == [
            vars_of(t) for t in eager.store.pages._tables.values()
        ]
        lazy.settle()
        assert torch.equal(lazy.store._rows, eager.store._rows)


def vars_of(table) -> tuple:
    return table.pages, table.oldest, table.first, table.end, table.at, table.room


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_is_kept_and_sent_is_as_if_every_step_were_fused_at_once(seed, ahead):
    soak = RestingSoak(seed, ahead)
    soak.run(700)
    soak.drain()
    soak.compare()
    lazy, eager = soak.sides
    assert soak.scheduler.preemptions > 0
    assert soak.scheduler.cache.hit_tokens > 0
    assert lazy.link.rows == eager.link.rows > 200
    assert sum(lazy.fuser.calls) == sum(eager.fuser.calls), "each row is fused once"
    assert max(lazy.fuser.calls) <= UNFUSED_ROWS
    assert len(lazy.fuser.calls) < len(eager.fuser.calls) / 2


def test_a_long_prompt_waits_for_nothing_and_is_not_fused_with_what_waits():
    side = Side(False, lambda: 0.0)
    sequence = RunningRequest(EngineRequest("a", tuple(range(150)), 1, 8), (0, 0))
    sequence.hashes = [bytes([block]) for block in range(37)]
    taps = torch.stack([torch.arange(150.0), torch.arange(150.0)], dim=1)
    side.take([Progress(sequence, 0, 0, 10)], taps[:10], send=False)
    assert side.fuser.calls == []
    side.take([Progress(sequence, 0, 10, 140)], taps[10:], send=False)
    assert side.fuser.calls == [10, 140]
    assert side.contexts._unfused.taps == []
