"""When the link proposer drafts, and what it tells the control: batch sizes, rests, seconds, settings."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from msgspec.structs import replace

from cluster.contracts import Configure
from cluster.link.face import LinkState
from cluster.link.messages import DraftAnswer, DraftAsk, Piece
from tests.verifier_service.test_engine import Inbox, make_engine, request, running
from tests.verifier_service.test_linked import BLOCK, CheckedLink, at, drive, linked
from verifier_service.control import SpeculationControl
from verifier_service.sequence import Progress, RunningRequest

__all__ = ["running"]


class Watched(SpeculationControl):
    """Always chooses `fixed`, or as it would; keeps what it was called with."""

    def __init__(self, fixed: int | None = None):
        super().__init__(BLOCK - 1)
        self._fixed = fixed
        self.chosen: list[int] = []
        self.stepped: list[tuple[int, int]] = []
        self.waits: list[tuple[int, int, float, int]] = []

    def choose(self, requests: int, willing: int | None = None) -> int:
        self.chosen.append(requests)
        return super().choose(requests, willing) if self._fixed is None else self._fixed

    def step(self, requests: int, drafted: int, accepted: int, seconds: float, prefilled: bool = False) -> None:
        self.stepped.append((requests, drafted))
        super().step(requests, drafted, accepted, seconds, prefilled)

    def waited(self, requests: int, asked: int, seconds: float, missed: int = 0) -> None:
        self.waits.append((requests, asked, seconds, missed))
        super().waited(requests, asked, seconds, missed)


def test_a_request_beside_one_that_wants_no_drafts_gets_some_and_one_size_is_told(running):
    control = Watched()
    link = CheckedLink()
    engine = make_engine(proposer=linked(link, control=control))
    inbox = Inbox()
    engine.submit(request("a", output=20), inbox)
    engine.submit(request("b", output=60, max_draft_tokens=0), inbox)
    running(engine)
    inbox.wait("a")
    assert engine.status().counters["accepted_tokens"] > 0
    inbox.wait("b")
    assert {ask.context_id for ask in link.asked} == {"v/a/0"}
    assert set(control.chosen) == {2}
    assert {requests for requests, *_ in control.waits} == {2}
    assert {requests for requests, drafted in control.stepped if drafted} == {2}


def test_the_control_is_not_asked_while_nothing_may_be_asked_for(running):
    control, link = Watched(fixed=3), CheckedLink()
    link.silent = True
    drive(link, linked(link, control=control, soft_deadline_s=10.0), running, names=3)
    assert len(control.chosen) == 1
    assert [(asked, missed) for _, asked, _, missed in control.waits] == [(3, 3)]


@pytest.mark.parametrize("settings", [{"max_draft_tokens": 0}, {"control": Watched(fixed=0)}])
def test_a_resting_engine_sends_no_prompts(running, settings):
    link = CheckedLink()
    engine = running(make_engine(proposer=linked(link, **settings), step_tokens=16))
    inbox = Inbox()
    engine.submit(request("a"), inbox)
    inbox.wait("a")
    engine.submit(request("b", prompt=60), inbox)
    inbox.wait("b")
    assert link.rows == 0


@pytest.mark.parametrize("values", [(-1, None), (None, 0.0), (None, 10.5), (None, -1.0), (None, float("nan"))])
def test_settings_that_cannot_work_are_ignored_and_logged(running, caplog, values):
    link = CheckedLink()
    engine = make_engine(proposer=linked(link))
    engine.configure(Configure(*values))
    assert "is ignored" in caplog.text
    inbox = Inbox()
    running(engine).submit(request("a", output=20), inbox)
    inbox.wait("a")
    assert engine.status().counters["accepted_tokens"] > 0
    assert set(link.waits) == {0.01}


def test_a_setting_that_can_work_is_taken_beside_one_that_cannot(running):
    link = CheckedLink()
    engine = make_engine(proposer=linked(link))
    engine.configure(Configure(max_draft_tokens=-1, soft_deadline_s=0.02))
    inbox = Inbox()
    running(engine).submit(request("a", output=20), inbox)
    inbox.wait("a")
    assert set(link.waits) == {0.02}


def test_catching_up_counts_as_time_spent_on_drafting():
    clock = SimpleNamespace(now=0.0)

    class SlowLink(CheckedLink):
        def append(self, pieces: Sequence[Piece], features: torch.Tensor) -> None:
            super().append(pieces, features)
            clock.now += 1.0

    link, control = SlowLink(), Watched(fixed=3)
    proposer = linked(link, control=control, clock=lambda: clock.now)
    sequence = RunningRequest(request("a", prompt=4), (0, 0))

    def step(start: int, kept: int) -> float:
        rows = torch.tensor([[float(at), float(sequence.tokens[at])] for at in range(start, start + kept)])
        sequence.computed = start + kept
        sequence.tokens.append(7)
        proposer.advance([Progress(sequence, 0, start, kept, token_ids=[7])], rows)
        return proposer.collect()

    link.queued_bytes = 1 << 30
    assert step(0, 4) == 0.0
    link.queued_bytes = 0
    assert step(4, 1) == 1.0
    assert control.waits == [(1, 1, 1.0, 0)]


def test_steps_run_ahead_while_a_stalled_drafter_owes_all_answers(running):
    link = CheckedLink()
    link.silent = True
    proposer = linked(link, soft_deadline_s=1e-9)  # patience alone would let it ask again
    counters = drive(link, proposer, running, names=2, runs_ahead=True)
    assert len(link.asked) == 2
    assert counters["steps_ahead"] > 15


@pytest.mark.parametrize(("version", "renewed"), [("v", 1), ("w", 2)])
def test_another_epoch_leaves_the_control_what_it_knows_unless_the_drafter_is_another(running, version, renewed):
    class Renewed(Watched):
        count = 0

        def renew(self) -> None:
            self.count += 1
            super().renew()

    class OtherLink(CheckedLink):
        @property
        def state(self) -> LinkState:
            state = super().state
            return replace(state, drafter_version="v" if state.epoch == 1 else version)

    link, control = OtherLink(), Renewed(fixed=3)
    drive(link, linked(link, control=control), running, at(link.begin_epoch, 5, 9))
    assert control.count == renewed


def test_of_an_answer_only_the_drafts_that_are_sure_enough_are_verified(running):
    class Telling(CheckedLink):
        """Right and sure of it, but for the last drafts of a block."""

        def draft(self, ask: DraftAsk) -> DraftAnswer:
            answer = super().draft(ask)
            wrong = tuple((token + 1) % 64 for token in answer.token_ids[3:])
            return DraftAnswer(
                ask.context_id,
                ask.base,
                answer.token_ids[:3] + wrong,
                (0.99,) * len(answer.token_ids[:3]) + (0.01,) * len(wrong),
            )

    link, control = Telling(), Watched(fixed=BLOCK - 1)
    counters = drive(link, linked(link, control=control), running, names=3)
    assert max(ask.rows for ask in link.asked) == BLOCK - 1
    assert 0 < counters["drafted_tokens"] < 1.2 * counters["accepted_tokens"]
