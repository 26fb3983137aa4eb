"""Steps planned before the outcome of the step before is known: what they hold, and when they have to wait."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import settings

from cluster.contracts import EngineRequest, SamplingParams
from tests.verifier_service.test_scheduler import LIMITS, Loop, RandomEvents, request
from verifier_service.flight import awaits, certain
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow
from verifier_service.sampling.sampler import NO_TOKEN
from verifier_service.scheduler import Scheduler, SchedulerLimits
from verifier_service.sequence import Progress, RunningRequest

ROOMY = replace(LIMITS, blocks=40)


def running(wanted: EngineRequest, slot: int = 0, shaping: object = None) -> RunningRequest:
    sequence = RunningRequest(wanted, (0, 0), shaping=shaping)
    sequence.slot = slot
    return sequence


def begun(*wanted: EngineRequest, limits=ROOMY) -> tuple[Scheduler, StepPlan]:
    """The first step holds all prompts, and is not committed."""
    scheduler = Scheduler(limits)
    for each in wanted:
        scheduler.add(each)
    return scheduler, scheduler.plan()


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (VerifyRow(0, 5, (1,)), True),
        (VerifyRow(0, 5, (1, 2)), False),
        (PrefillChunk(0, 0, (1, 2), completes_prompt=False), True),
        (PrefillChunk(0, 0, (1, 2), completes_prompt=True), True),
    ],
)
def test_the_outcome_of_a_row_is_certain_unless_it_holds_drafts(work, expected):
    assert certain([(running(request("a")), work)]) is expected


def test_the_drafts_of_a_request_that_has_left_stand_in_nobodys_way():
    sequence = running(request("a"))
    sequence.slot = -1
    assert certain([(sequence, VerifyRow(0, 5, (1, 2)))])


@pytest.mark.parametrize(
    ("shaping", "work", "expected"),
    [
        (object(), VerifyRow(0, 5, (-1,)), True),
        (object(), VerifyRow(0, 5, (1, 2)), False),
        (object(), PrefillChunk(0, 0, (1, 2), completes_prompt=True), False),
        (None, VerifyRow(0, 5, (-1,)), False),
    ],
)
def test_only_a_shaped_row_after_a_token_under_way_awaits_what_the_host_reads(shaping, work, expected):
    sequence = running(request("a", sampling=SamplingParams(logprobs=2)), shaping=shaping)
    assert certain([(sequence, work)]) is (work != VerifyRow(0, 5, (1, 2)))
    assert awaits([(sequence, work)]) is expected


def test_a_plan_ahead_names_the_rows_of_the_step_before_that_its_tokens_come_from():
    scheduler, first = begun(request("a", prompt=3), request("b", prompt=5))
    assert not first.ahead
    second = scheduler.plan_ahead()
    assert second is not None
    assert second.ahead
    assert [(row.start, row.token_ids) for row in second.verify] == [(3, (-1,)), (5, (-2,))]
    scheduler.commit([10, 11])
    third = scheduler.plan_ahead()
    assert third is not None
    assert [(row.start, row.token_ids) for row in third.verify] == [(4, (-1,)), (6, (-2,))]
    assert third.decided == ((second.verify[0].slot, 1), (second.verify[1].slot, 1))
    progress = scheduler.commit([12, 13])
    assert [p.token_ids for p in progress] == [[12], [13]]
    assert [s.tokens[-2:] for s in scheduler.requests()] == [[10, 12], [11, 13]]


def test_a_chunk_that_does_not_complete_its_prompt_is_followed_by_the_next():
    scheduler, first = begun(request("a", prompt=30), limits=replace(ROOMY, step_tokens=16))
    second = scheduler.plan_ahead()
    assert second is not None
    assert [(chunk.start, len(chunk.token_ids)) for chunk in first.prefill + second.prefill] == [(0, 16), (16, 14)]


def test_a_request_whose_last_token_is_under_way_gets_no_further_row():
    scheduler, _ = begun(request("a", output=1), request("b", output=2))
    second = scheduler.plan_ahead()
    assert second is not None
    assert len(second.verify) == 1
    assert [p.finish for p in scheduler.commit([10, 11])] == ["length", None]
    assert scheduler.plan_ahead() is None, "nobody goes on"
    assert [p.finish for p in scheduler.commit([12])] == ["length"]
    assert scheduler.pool.free == scheduler.pool.total


def test_a_row_of_a_request_that_its_stop_token_has_ended_comes_to_nothing():
    scheduler, _ = begun(request("a", stop_token_ids=frozenset({10})), request("b"))
    assert scheduler.plan_ahead() is not None
    assert [p.finish for p in scheduler.commit([10, 11])] == ["stop", None]
    third = scheduler.plan_ahead()
    assert third is not None
    assert len(third.verify) == 1
    assert len(third.decided) == 2, "the ranks have computed both"
    assert len(third.released) == 1
    (progress,) = scheduler.commit([12, 13])
    assert (progress.row, progress.token_ids) == (1, [13])


def test_what_comes_after_no_token_at_all_comes_to_nothing():
    scheduler, _ = begun(request("a"))
    assert scheduler.plan_ahead() is not None
    assert [p.finish for p in scheduler.commit([NO_TOKEN])] == ["error"]
    assert scheduler.commit([5]) == []
    assert len(scheduler) == 0
    assert scheduler.cache.counters()["cached_blocks"] == 0, "what it computed is no good"


def test_a_request_that_is_removed_while_two_steps_hold_it_gives_everything_back_at_once():
    scheduler, first = begun(request("a"), request("b"))
    assert scheduler.plan_ahead() is not None
    scheduler.remove(("a", 0))
    assert [p.sequence.key for p in scheduler.commit([10, 11])] == [("b", 0)]
    scheduler.add(request("c"))
    third = scheduler.plan_ahead()
    assert third is not None
    assert [chunk.slot for chunk in third.prefill] == [first.prefill[0].slot], "its slot has another user already"
    assert set(third.released) == {first.prefill[0].slot}
    assert [p.token_ids for p in scheduler.commit([12, 13])] == [[13]]


def test_a_checkpoint_that_was_to_be_written_for_a_removed_request_is_blank_again():
    scheduler, first = begun(request("a", prompt=10), limits=replace(ROOMY, checkpoints=2))
    assert any(chunk.checkpoint >= 0 for chunk in first.prefill)
    scheduler.remove(("a", 0))
    assert scheduler.commit([10]) == []
    assert scheduler.cache.checkpoints.taken == 0


def test_nobody_gives_way_to_a_step_planned_ahead():
    """Four blocks of four tokens: with the fifth token of each request none is left, with the ninth one is missing."""
    scheduler, _ = begun(
        request("a", prompt=4, output=8), request("b", prompt=4, output=8), limits=replace(LIMITS, blocks=4)
    )
    for token in (10, 11, 12, 13):
        assert scheduler.plan_ahead() is not None
        scheduler.commit([token, token])
    assert scheduler.pool.free == 0
    assert scheduler.plan_ahead() is None
    scheduler.commit([14, 14])
    scheduler.plan()
    assert scheduler.preemptions == 1


def test_drafts_that_come_while_their_request_is_under_way_are_used_where_they_still_fit():
    scheduler, _ = begun(request("a"), request("b"))
    scheduler.commit([10, 20])
    scheduler.plan()
    assert scheduler.plan_ahead() is not None
    scheduler.commit([11, 21])
    a, b = scheduler.requests()
    a.drafts, b.drafts = (12, 13, 14), (99, 13, 14)
    assert scheduler.plan_ahead() is None
    scheduler.commit([12, 22])
    assert (a.drafts, b.drafts) == ((13, 14), ())
    assert [row.token_ids for row in scheduler.plan().verify] == [(12, 13, 14), (22,)]
    assert scheduler.plan_ahead() is None, "drafts may stand or fall"


def test_the_drafts_of_a_removed_request_have_rows_of_the_logits_all_the_same():
    scheduler, _ = begun(*(request(name, prompt=1, output=20) for name in "abcd"))
    scheduler.commit([10, 20, 30, 40])
    scheduler.limits = replace(ROOMY, step_tokens=2)  # for a and b; drafts for c come meanwhile
    scheduler.plan()
    scheduler.limits = ROOMY
    scheduler.requests()[2].drafts = (31, 32)
    second = scheduler.plan_ahead()
    assert second is not None
    assert [row.token_ids for row in second.verify] == [(-1,), (-2,), (30, 31, 32), (40,)]
    scheduler.commit([11, 21])
    scheduler.remove(("c", 0))
    third = scheduler.plan_ahead()
    assert third is not None
    assert [row.token_ids for row in third.verify] == [(-1,), (-2,), (-6,)]


class LoopAhead(Loop):
    """Mostly plans a step before the one before is committed, where that is possible."""

    def __init__(self, limits: SchedulerLimits):
        super().__init__(limits)
        self.random = random.Random(limits.step_tokens)
        self.samples: list[int] | None = None  # of a step that is not committed

    def step(self) -> list[Progress]:
        if self.samples is None:
            self.forward(self.scheduler.plan())
        samples, self.samples = self.samples, None
        if self.random.random() < 0.8 and (plan := self.scheduler.plan_ahead()) is not None:
            self.forward(plan)
        assert samples is not None
        progress = self.scheduler.commit(samples)
        for p in progress:
            self.output[p.sequence.request.request_id] += p.token_ids
            if p.finish:
                self.finished[p.sequence.request.request_id] = p.finish
        return progress

    def forward(self, plan: StepPlan) -> None:
        self.last = plan
        logits = self.runner.forward(plan).logits
        assert logits is not None
        self.runner.feed(logits.argmax(-1))
        self.samples = logits.argmax(-1).tolist()


class RandomEventsAhead(RandomEvents):
    """A request is drafted for now and then only, also while its next token is under way."""

    loop_type = LoopAhead

    def drafts(self, tokens: list[int], right: float) -> tuple[int, ...]:
        return super().drafts(tokens, right) if self.random.random() < 0.3 else ()


RandomEventsAhead.TestCase.settings = settings(RandomEvents.TestCase.settings, max_examples=40)
test_random_events_leak_nothing_and_change_no_text_ahead_either = RandomEventsAhead.TestCase
