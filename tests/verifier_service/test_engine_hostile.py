"""The engine under floods, numbers that are none, settings that cannot be and a drafter that hangs."""

from __future__ import annotations

import threading

import pytest
import torch

from cluster.contracts import Configure, SamplingParams
from tests.verifier_service.fake_runner import FakeRunner
from tests.verifier_service.test_engine import WAIT_S, Guesser, Inbox, expected, make_engine, request, running
from verifier_service.engine import SPARE_COMMANDS
from verifier_service.model.face import ForwardOutput
from verifier_service.plan import StepPlan

__all__ = ["running"]  # a fixture


def test_more_commands_than_can_wait_are_refused_at_once(running):
    engine = make_engine(slots=1, max_waiting=2)
    inbox = Inbox()
    names = [f"r{i}" for i in range(1 + 2 + SPARE_COMMANDS)]
    for name in names:
        engine.submit(request(name), inbox)
    assert not inbox.deltas
    engine.submit(request("late"), inbox)
    assert (inbox.last("late").finish, inbox.last("late").error_kind) == ("error", "overloaded")
    running(engine)
    inbox.wait(*names)
    engine.submit(request("later"), inbox)
    inbox.wait("later")
    assert inbox.finish("later") == "length"


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, logprobs=1)])
def test_logits_that_are_not_finite_end_their_request_and_no_other(running, sampling):
    class Poisoned(FakeRunner):
        """The logits of the longest request are NaN from position 12 on."""

        def __init__(self) -> None:
            super().__init__(4, 40, 4)
            self.prompts: dict[int, int] = {}

        def forward(self, plan: StepPlan) -> ForwardOutput:
            output = super().forward(plan)
            assert output.logits is not None
            row = 0
            for work in plan.verify:
                if self.prompts[work.slot] == 9:
                    output.logits[row + max(0, 12 - work.start) : row + len(work.token_ids)] = torch.nan
                row += len(work.token_ids)
            for chunk in plan.prefill:
                self.prompts[chunk.slot] = chunk.start + len(chunk.token_ids)
            return output

    engine = running(make_engine(Poisoned(), Guesser(0.8)))
    inbox = Inbox()
    engine.submit(request("bad", 9, 30, sampling=sampling), inbox)
    for name in "abc":
        engine.submit(request(name, output=20), inbox)
    inbox.wait("bad", *"abc")
    last = inbox.last("bad")
    assert (last.finish, last.error_kind) == ("error", None)
    assert "not finite" in (last.error or "")
    assert len(inbox.text("bad")) == 4
    for name in "abc":
        assert inbox.text(name) == expected(name, output=20)
    status = engine.status()
    assert (status.running, status.free_blocks) == (0, status.total_blocks)
    assert status.counters["finished_error"] == 1


def test_settings_that_cannot_be_are_ignored(caplog):
    told: list = []

    class Listening(Guesser):
        def configure(self, max_draft_tokens: int | None, soft_deadline_s: float | None) -> None:
            told.append((max_draft_tokens, soft_deadline_s))

    engine = make_engine(proposer=Listening(0.5))
    for drafts, deadline_s in ((-1, 0.5), (3, 0.0), (0, 10.5), (2, float("nan")), (0, 10.0)):
        engine.configure(Configure(drafts, deadline_s))
    assert told == [(None, 0.5), (3, None), (0, None), (2, None), (0, 10.0)]
    assert len(caplog.records) == 4


def test_stopping_does_not_wait_for_a_drafter_that_does_not_answer():
    release, stopped = threading.Event(), threading.Event()

    class Hanging(Guesser):
        def stop(self) -> None:
            stopped.set()
            release.wait(WAIT_S)

    engine = make_engine(proposer=Hanging(0.5))
    engine.start()
    try:
        engine.stop(timeout_s=2.0)  # less than the drafter is given
        assert stopped.wait(WAIT_S)
    finally:
        release.set()
