"""The scheduler under thousands of random events, and its single promises."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.contracts import EngineRequest
from cluster.errors import OverloadedError
from tests.verifier_service.fake_runner import FakeModel, FakeRunner
from verifier_service.flight import sampled_rows
from verifier_service.plan import StepPlan
from verifier_service.scheduler import Scheduler, SchedulerLimits
from verifier_service.sequence import Progress

MODEL = FakeModel()
LIMITS = SchedulerLimits(slots=4, blocks=12, block_tokens=4, step_tokens=16, max_waiting=5)


def request(name: str, prompt: int = 5, output: int = 8, **changes) -> EngineRequest:
    ids = tuple(random.Random(name).randrange(64) for _ in range(prompt))
    return EngineRequest(request_id=name, prompt_ids=ids, seed=1, max_new_tokens=output, **changes)


class Loop:
    """A scheduler with a runner behind it, which checks every plan."""

    def __init__(self, limits: SchedulerLimits = LIMITS):
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.runner = FakeRunner(limits.slots, limits.blocks, limits.block_tokens)
        self.output: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.last = StepPlan(0)

    def add(self, wanted: EngineRequest) -> None:
        self.scheduler.add(wanted)
        self.output[wanted.request_id] = list(wanted.generated_ids)

    def step(self) -> list[Progress]:
        self.last = self.scheduler.plan()
        logits = self.runner.forward(self.last).logits
        assert logits is not None
        progress = self.scheduler.commit(logits.argmax(-1).tolist())
        for p in progress:
            self.output[p.sequence.request.request_id] += p.token_ids
            if p.finish:
                self.finished[p.sequence.request.request_id] = p.finish
        return progress

    def run(self, steps: int = 500) -> None:
        for _ in range(steps):
            if not len(self.scheduler):
                return
            self.step()
        raise AssertionError(f"still {len(self.scheduler)} requests after {steps} steps")


def test_matched_counts_drafts_that_a_stop_token_cut_off():
    loop = Loop()
    wanted = request("a")
    text = MODEL.greedy(wanted.prompt_ids, 8)
    assert text[2] not in text[:2]
    loop.add(request("a", stop_token_ids=frozenset({text[2]})))
    loop.step()
    loop.scheduler.requests()[0].drafts = tuple(text[1:6])
    (progress,) = loop.step()
    assert (progress.drafted, progress.matched, progress.accepted) == (5, 5, 2)
    assert (progress.token_ids, progress.finish) == (text[1:3], "stop")


class RandomEvents(RuleBasedStateMachine):
    """Requests come, step with drafts of any quality, and are aborted at any moment."""

    loop_type: type[Loop] = Loop

    @initialize(seed=st.integers(0, 1 << 30), step_tokens=st.sampled_from([2, 5, 16, 64]))
    def begin(self, seed: int, step_tokens: int) -> None:
        self.random = random.Random(seed)
        self.loop = self.loop_type(SchedulerLimits(4, 12, 4, step_tokens, 5))
        self.requests: dict[str, EngineRequest] = {}
        self.aborted: set[str] = set()

    @rule(prompt=st.integers(1, 30), output=st.integers(1, 17), priority=st.integers(0, 2), resumed=st.integers(0, 9))
    def submit(self, prompt: int, output: int, priority: int, resumed: int) -> None:
        name = f"r{len(self.requests)}"
        wanted = request(name, prompt, output, priority=priority)
        generated = tuple(MODEL.greedy(wanted.prompt_ids, min(resumed, output - 1)))
        wanted = request(name, prompt, output, priority=priority, generated_ids=generated)
        try:
            self.loop.add(wanted)
        except OverloadedError:
            assert self.loop.scheduler.waiting >= self.loop.limits.max_waiting, name
        else:
            self.requests[name] = wanted

    @rule(steps=st.integers(1, 8), right=st.floats(0, 1))
    def work(self, steps: int, right: float) -> None:
        for _ in range(steps):
            for sequence in self.loop.scheduler.requests():
                if sequence.slot >= 0 and sequence.computed == len(sequence.tokens) - 1:
                    sequence.drafts = self.drafts(sequence.tokens, right)
            self.loop.step()
            self.check()

    @rule(pick=st.integers(0, 1 << 20))
    def abort(self, pick: int) -> None:
        held = self.loop.scheduler.requests()
        if held:
            sequence = held[pick % len(held)]
            assert self.loop.scheduler.remove(sequence.key) is sequence
            assert self.loop.scheduler.remove(sequence.key) is None
            self.aborted.add(sequence.request.request_id)

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "loop"):
            return
        scheduler, limits = self.loop.scheduler, self.loop.limits
        held = scheduler.requests()
        owned = Counter(block for sequence in held for block in sequence.blocks)
        assert all(scheduler.pool.users(block) == owned[block] for block in range(limits.blocks))
        assert scheduler.pool.free + len(owned) == limits.blocks
        slots = [sequence.slot for sequence in held if sequence.slot >= 0]
        assert len(slots) == len(set(slots)) == scheduler.running <= limits.slots
        assert all(sequence.blocks == [] for sequence in held if sequence.slot < 0)
        plan = self.loop.last
        tokens = [len(row.token_ids) for row in plan.verify] + [len(chunk.token_ids) for chunk in plan.prefill]
        assert sum(tokens) <= limits.step_tokens
        for name, output in self.loop.output.items():
            wanted = self.requests.get(name)
            if wanted is not None:
                assert output == MODEL.greedy(wanted.prompt_ids, len(output)), name

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.loop.run()
        assert self.loop.scheduler.pool.free == self.loop.limits.blocks
        for name, wanted in self.requests.items():
            if name not in self.aborted:
                assert len(self.loop.output[name]) == wanted.max_new_tokens
                assert self.loop.finished[name] == "length"

    def drafts(self, tokens: list[int], right: float) -> tuple[int, ...]:
        guesses = MODEL.greedy(tokens, self.random.randrange(8))
        return tuple(g if self.random.random() < right else self.random.randrange(64) for g in guesses)


RandomEvents.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
test_random_events_leak_nothing_and_change_no_text = RandomEvents.TestCase


def test_requests_run_in_the_order_of_their_coming():
    loop = Loop(SchedulerLimits(1, 8, 4, 16, 5))
    for name in "abc":
        loop.add(request(name))
    loop.run()
    assert list(loop.finished) == ["a", "b", "c"]


def test_a_lower_priority_number_goes_first():
    loop = Loop(SchedulerLimits(1, 8, 4, 16, 5))
    loop.add(request("late", priority=1))
    loop.add(request("early", priority=0))
    loop.run()
    assert list(loop.finished) == ["early", "late"]


def test_a_full_queue_refuses_with_its_limit():
    loop = Loop(SchedulerLimits(1, 8, 4, 16, 2))
    for name in "abc":
        loop.add(request(name))
    with pytest.raises(OverloadedError, match="max_waiting 2"):
        loop.add(request("d"))


def test_a_request_without_waiting_room_still_gets_a_free_slot():
    loop = Loop(SchedulerLimits(1, 8, 4, 16, 0))
    loop.add(request("a"))
    with pytest.raises(OverloadedError):
        loop.add(request("b"))
    loop.run()


def test_a_long_prompt_is_prefilled_beside_verify_rows():
    loop = Loop(SchedulerLimits(2, 40, 4, 8, 5))
    loop.add(request("short", prompt=4, output=20))
    loop.step()
    loop.add(request("long", prompt=60, output=2))
    loop.step()
    assert len(loop.last.verify) == 1
    assert [len(chunk.token_ids) for chunk in loop.last.prefill] == [7]
    loop.run()


def test_drafts_never_starve_a_waiting_prompt():
    loop = Loop(SchedulerLimits(4, 60, 4, 16, 5))
    for name in "abc":
        loop.add(request(name, prompt=2, output=40))
    loop.step()
    loop.add(request("prompt", prompt=8, output=1))
    for sequence in loop.scheduler.requests():
        sequence.drafts = (1,) * 15
    loop.step()
    assert sum(len(chunk.token_ids) for chunk in loop.last.prefill) == 4


def test_more_decoding_requests_than_budget_take_turns():
    loop = Loop(SchedulerLimits(6, 60, 4, 2, 6))
    for name in "abcdef":
        loop.add(request(name, prompt=1, output=10))
    for _ in range(30):
        loop.step()
    counts = [len(output) for output in loop.output.values()]
    assert max(counts) - min(counts) <= 4
    loop.run()


def test_the_last_in_order_is_preempted_and_its_output_is_kept():
    loop = Loop(SchedulerLimits(2, 6, 4, 32, 5))
    loop.add(request("first", prompt=6, output=14))
    loop.add(request("second", prompt=6, output=14))
    loop.run()
    assert loop.scheduler.preemptions > 0
    assert list(loop.finished) == ["first", "second"]
    for name, output in loop.output.items():
        assert output == MODEL.greedy(request(name, prompt=6).prompt_ids, 14)


def test_drafts_take_free_blocks_but_preempt_nobody():
    loop = Loop(SchedulerLimits(2, 4, 4, 32, 5))
    loop.add(request("a", prompt=3, output=5))
    loop.add(request("b", prompt=3, output=5))
    loop.step()
    for sequence in loop.scheduler.requests():
        sequence.drafts = (1,) * 7
    loop.step()
    assert loop.scheduler.preemptions == 0
    loop.run()


def test_a_stop_token_ends_the_output_and_is_part_of_it():
    plain = MODEL.greedy(request("a").prompt_ids, 8)
    loop = Loop()
    loop.add(request("a", stop_token_ids=frozenset({plain[3]})))
    loop.run()
    assert loop.finished["a"] == "stop"
    assert loop.output["a"] == plain[: plain.index(plain[3]) + 1]


def test_a_stop_token_before_min_new_tokens_does_not_end_the_output():
    plain = MODEL.greedy(request("a").prompt_ids, 8)
    loop = Loop()
    loop.add(request("a", stop_token_ids=frozenset(plain[:4]), min_new_tokens=3))
    loop.run()
    assert loop.output["a"] == plain[:4]


def test_drafts_beyond_a_stop_token_are_not_output():
    plain = MODEL.greedy(request("a").prompt_ids, 8)
    loop = Loop()
    loop.add(request("a", stop_token_ids=frozenset({plain[2]})))
    loop.step()
    loop.scheduler.requests()[0].drafts = tuple(plain[1:7])
    (progress,) = loop.step()
    assert loop.output["a"] == plain[: plain.index(plain[2]) + 1]
    assert progress.accepted == len(progress.token_ids)
    assert progress.finish == "stop"


def test_rows_of_sampled_requests_carry_their_absolute_positions():
    from cluster.contracts import SamplingParams

    loop = Loop()
    loop.add(request("greedy", prompt=3))
    loop.add(request("sampled", prompt=5, sampling=SamplingParams(temperature=1.0)))
    loop.scheduler.plan()
    (rows,) = sampled_rows(loop.scheduler.planned)
    assert (rows.sequence.request.request_id, rows.row, rows.count, rows.position) == ("sampled", 1, 1, 5)


def turns(loop: Loop, *prompts: list[int], **changes) -> list[int]:
    """Run these prompts one after the other; how many tokens each found in the cache."""
    found = []
    for number, prompt in enumerate(prompts):
        before = loop.scheduler.cache.hit_tokens
        loop.add(EngineRequest(f"turn{number}{changes}", tuple(prompt), seed=1, max_new_tokens=8, **changes))
        loop.run()
        found.append(loop.scheduler.cache.hit_tokens - before)
    return found


def test_a_later_turn_finds_the_prompt_and_the_output_of_the_one_before():
    first = list(range(10))
    whole = first + MODEL.greedy(first, 8)  # its last token was never in the cache
    assert turns(Loop(), first, [*whole, 1, 2]) == [0, 16]


def test_a_prompt_that_is_cached_to_its_end_still_computes_its_last_token():
    loop = Loop()
    assert turns(loop, list(range(8)), list(range(8))) == [0, 4]
    assert loop.finished == {"turn0{}": "length", "turn1{}": "length"}


def test_tenants_find_nothing_of_each_other():
    loop, prompt = Loop(), list(range(12))
    assert turns(loop, prompt, cache_salt="red") == [0]
    assert turns(loop, prompt, cache_salt="blue") == [0]
    assert turns(loop, prompt, cache_salt="red", priority=1) == [8]


def test_without_a_prefix_cache_nothing_is_found():
    loop = Loop(SchedulerLimits(4, 12, 4, 16, 5, prefix_cache=False))
    assert turns(loop, list(range(12)), list(range(12))) == [0, 0]
    assert loop.scheduler.pool.cached == 0


def test_choices_of_one_prompt_compute_it_once():
    loop = Loop(SchedulerLimits(4, 60, 4, 8, 5))
    prompt = tuple(range(33))
    for choice in range(4):
        loop.scheduler.add(EngineRequest("a", prompt, seed=1, max_new_tokens=4, choice=choice))
    loop.output["a"] = []
    computed = 0
    while len(loop.scheduler):
        loop.step()
        computed += sum(len(chunk.token_ids) for chunk in loop.last.prefill)
    assert computed == 32 + 3  # each one's last token apart; the first's is the first row it decodes


def test_a_request_that_waits_for_anothers_prefix_goes_on_when_that_is_aborted():
    loop = Loop(SchedulerLimits(4, 60, 4, 8, 5))
    prompt = tuple(range(33))
    for name in ("first", "second"):
        loop.add(EngineRequest(name, prompt, seed=1, max_new_tokens=2))
    loop.step()
    assert loop.scheduler.waiting == 1
    loop.scheduler.remove(("first", 0))
    loop.run()
    assert loop.finished == {"second": "length"}


def test_a_request_without_a_slot_is_looked_up_in_no_step(monkeypatch):
    loop = Loop(replace(LIMITS, slots=1))
    loop.add(request("a", output=30))
    loop.step()
    loop.add(request("b", prompt=20))
    looked: list[object] = []
    monkeypatch.setattr(loop.scheduler.cache, "match", looked.append)
    for _ in range(5):
        loop.step()
    assert not looked


def test_a_preempted_request_finds_what_it_had_computed():
    loop = Loop(SchedulerLimits(2, 8, 4, 32, 5))
    for name in ("first", "second"):
        loop.add(request(name, prompt=7, output=14))
    loop.run()
    assert loop.scheduler.preemptions > 0
    assert loop.scheduler.cache.hit_tokens > 0


def test_what_ended_in_an_error_is_not_found_by_others():
    scheduler = Scheduler(LIMITS)
    for name in ("a", "b"):
        scheduler.add(EngineRequest(name, tuple(range(10)), seed=1, max_new_tokens=4))
        scheduler.plan()
        scheduler.commit([-1])
        assert scheduler.pool.cached == 0
    assert scheduler.cache.hit_tokens == 0


def test_a_short_prompt_passes_a_long_one_and_the_long_one_keeps_half_of_the_budget():
    loop = Loop(SchedulerLimits(4, 100, 4, 8, 5))
    loop.add(request("long", prompt=80, output=1))
    loop.step()
    loop.add(request("short", prompt=9, output=1))
    for _ in range(3):
        loop.step()
        assert loop.last.prefill[0].slot == 0
        assert len(loop.last.prefill[0].token_ids) >= 4
    assert loop.finished == {"short": "length"}
    loop.run()


def test_a_stream_of_short_prompts_does_not_starve_a_long_one():
    loop = Loop(SchedulerLimits(4, 100, 4, 8, 50))
    loop.add(request("long", prompt=80, output=1))
    for step in range(20):
        loop.add(request(f"short{step}", prompt=7, output=1))
        loop.step()
    assert "long" in loop.finished
    assert len(loop.finished) > 8
