"""The engine over a fake model: its text is the model's own, whatever is drafted, aborted, preempted or resumed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch

from cluster.contracts import Delta, EngineInfo, EngineRequest, SamplingParams
from tests.verifier_service.fake_runner import Broken, FakeModel, FakeRunner
from verifier_service.engine import Engine
from verifier_service.model.face import ForwardOutput
from verifier_service.plan import StepPlan
from verifier_service.proposers.plain import NoProposer
from verifier_service.scheduler import SchedulerLimits
from verifier_service.sequence import Progress

MODEL = FakeModel()
WAIT_S = 30.0


class Inbox:
    """A sink that keeps what it gets, and lets a test wait for a finish."""

    def __init__(self) -> None:
        self.deltas: dict[str, list[Delta]] = {}
        self._changed = threading.Condition()

    def __call__(self, deltas: list[Delta]) -> None:
        with self._changed:
            for delta in deltas:
                self.deltas.setdefault(delta.request_id, []).append(delta)
            self._changed.notify_all()

    def wait(self, *names: str) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: all(self.finish(name) for name in names), WAIT_S)
        assert done, f"{names} are not all finished: {self.deltas}"

    def wait_for_token(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.text(name)), WAIT_S)

    def finish(self, name: str) -> str | None:
        return next((d.finish for d in self.deltas.get(name, ()) if d.finish), None)

    def last(self, name: str) -> Delta:
        return self.deltas[name][-1]

    def text(self, name: str) -> list[int]:
        return [token for delta in self.deltas.get(name, ()) for token in delta.token_ids]


class Guesser(NoProposer):
    """Drafts that are right with a given probability: 1 always, 0 never, between: partially right."""

    def __init__(self, right: float, longest: int = 7):
        self._right, self._longest = right, longest
        self._random = random.Random(5)
        self._ready: list[Progress] = []

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        self._ready = [p for p in progress if p.token_ids and not p.finish]

    def collect(self) -> float:
        for p in self._ready:
            guesses = MODEL.greedy(p.sequence.tokens, self._longest)
            p.sequence.drafts = tuple(
                guess if self._random.random() < self._right else (guess + 1) % 64 for guess in guesses
            )
        return 0.0


def make_engine(
    runner: FakeRunner | None = None,
    proposer=None,
    *,
    make_proposer=NoProposer,
    heartbeat_s: float = 60.0,
    runs_ahead: bool | None = None,
    **limits,
) -> Engine:
    sizes = {"slots": 4, "blocks": 40, "block_tokens": 4, "step_tokens": 32, "max_waiting": 50, **limits}
    runner = runner or FakeRunner(sizes["slots"], sizes["blocks"], sizes["block_tokens"], max_context=128)
    info = EngineInfo("e", "f", 128, 64, sizes["slots"], 8)
    return Engine(
        runner,
        SchedulerLimits(**sizes),
        info,
        proposer=proposer,
        make_proposer=make_proposer,
        heartbeat_s=heartbeat_s,
        runs_ahead=runs_ahead,
    )


@pytest.fixture
def running() -> Iterator:
    """A function that starts an engine, stopped at the test's end."""
    engines: list[Engine] = []

    def start(engine: Engine) -> Engine:
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.stop()


def request(name: str, prompt: int = 5, output: int = 12, **changes) -> EngineRequest:
    ids = tuple(random.Random(name).randrange(64) for _ in range(prompt))
    return EngineRequest(**{"request_id": name, "prompt_ids": ids, "seed": 1, "max_new_tokens": output, **changes})


def expected(name: str, prompt: int = 5, output: int = 12) -> list[int]:
    return MODEL.greedy(request(name, prompt).prompt_ids, output)


@pytest.mark.parametrize("blocks", [40, 12])
@pytest.mark.parametrize("right", [None, 0.0, 0.6, 1.0])
def test_greedy_text_is_the_models_own_with_any_drafts_and_under_preemption(running, right, blocks):
    engine = running(make_engine(proposer=None if right is None else Guesser(right), blocks=blocks))
    inbox = Inbox()
    names = [f"r{i}" for i in range(12)]
    for i, name in enumerate(names):
        engine.submit(request(name, 1 + 2 * i, 12), inbox)
    inbox.wait(*names)
    for i, name in enumerate(names):
        assert inbox.text(name) == expected(name, 1 + 2 * i)
    counters = engine.status().counters
    assert (counters["preemptions"] > 0) == (blocks == 12)
    assert counters["output_tokens"] == 12 * 12
    if right == 1.0:
        assert counters["accepted_tokens"] > 0.6 * counters["output_tokens"]


@pytest.mark.parametrize("params", [{}, {"top_k": 9}, {"top_p": 0.9}])
def test_sampled_text_is_the_same_with_and_without_drafts(running, params):
    texts = []
    for proposer, blocks in ((None, 40), (Guesser(0.7), 40), (Guesser(0.4), 10)):
        engine = running(make_engine(proposer=proposer, blocks=blocks))
        inbox = Inbox()
        names = [f"r{i}" for i in range(6)]
        sampling = SamplingParams(temperature=0.9, **params)
        for i, name in enumerate(names):
            engine.submit(request(name, 3 + i, 14, seed=i, sampling=sampling if i % 3 else SamplingParams()), inbox)
        inbox.wait(*names)
        texts.append([inbox.text(name) for name in names])
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][1] != expected("r1", 4, 14)


def test_the_accepted_and_drafted_counts_of_deltas_add_up(running):
    engine = running(make_engine(proposer=Guesser(0.6)))
    inbox = Inbox()
    engine.submit(request("a", output=40), inbox)
    inbox.wait("a")
    assert all(delta.accepted <= delta.drafted for delta in inbox.deltas["a"])
    assert all(delta.accepted <= len(delta.token_ids) for delta in inbox.deltas["a"])
    counters = engine.status().counters
    assert sum(delta.accepted for delta in inbox.deltas["a"]) == counters["accepted_tokens"] > 0
    assert sum(delta.drafted for delta in inbox.deltas["a"]) == counters["drafted_tokens"]


def test_the_first_delta_tells_how_much_of_the_prompt_was_cached(running):
    engine = running(make_engine(proposer=Guesser(0.6)))
    inbox = Inbox()
    for name in ("a", "b"):
        engine.submit(request(name, prompt_ids=tuple(range(13))), inbox)
        inbox.wait(name)
    assert [delta.cached for delta in inbox.deltas["a"] if delta.cached] == []
    assert [delta.cached for delta in inbox.deltas["b"] if delta.token_ids][:1] == [12]
    assert sum(delta.cached for delta in inbox.deltas["b"]) == 12


def test_a_resumed_request_goes_on_where_it_was(running):
    engine = running(make_engine(proposer=Guesser(0.5)))
    whole = expected("a", output=12)
    inbox = Inbox()
    engine.submit(request("a", generated_ids=tuple(whole[:7])), inbox)
    inbox.wait("a")
    assert inbox.text("a") == whole[7:]


def test_a_resumed_request_that_had_ended_ends_at_once(running):
    engine = running(make_engine())
    inbox = Inbox()
    engine.submit(request("full", output=2, generated_ids=(1, 2)), inbox)
    engine.submit(request("stopped", generated_ids=(1, 2), stop_token_ids=frozenset({2})), inbox)
    inbox.wait("full", "stopped")
    assert (inbox.finish("full"), inbox.finish("stopped")) == ("length", "stop")
    assert inbox.text("full") == inbox.text("stopped") == []


def test_logprobs_come_with_every_token(running):
    engine = running(make_engine(proposer=Guesser(0.6)))
    inbox = Inbox()
    engine.submit(request("a", sampling=SamplingParams(logprobs=2)), inbox)
    inbox.wait("a")
    for delta in inbox.deltas["a"]:
        assert delta.logprobs is not None
        assert len(delta.logprobs) == len(delta.token_ids)
        for token, own in zip(delta.token_ids, delta.logprobs):
            assert own.top[0] == (token, own.logprob)  # greedy
            assert len(own.top) == 2


def test_an_aborted_request_gives_everything_back(running):
    engine = running(make_engine())
    inbox = Inbox()
    engine.submit(request("a", output=100), inbox)
    inbox.wait_for_token("a")
    engine.abort("a")
    inbox.wait("a")
    if inbox.finish("a") == "abort":
        assert inbox.text("a") == expected("a", output=100)[: len(inbox.text("a"))]
    status = engine.status()
    assert (status.running, status.free_blocks) == (0, status.total_blocks)


def test_dropping_a_sink_leaves_the_requests_of_others_alone(running):
    engine = make_engine()
    ours, theirs = Inbox(), Inbox()
    engine.submit(request("ours"), ours)
    engine.submit(request("theirs"), theirs)
    engine.abort("theirs", sink=ours)
    engine.drop(ours)
    running(engine)
    theirs.wait("theirs")
    assert ours.finish("ours") == "abort"
    assert theirs.text("theirs") == expected("theirs")


def test_a_passed_deadline_ends_a_request(running):
    engine = running(make_engine())
    inbox = Inbox()
    engine.submit(request("a", deadline=time.time() - 1), inbox)
    inbox.wait("a")
    assert inbox.finish("a") == "deadline"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt_ids": ()}, ["prompt_ids", "empty"]),
        ({"prompt_ids": (1, 64)}, ["prompt_ids[1]", "64", "0..63"]),
        ({"prompt_ids": (-1,)}, ["prompt_ids[0]", "-1"]),
        ({"generated_ids": (99,)}, ["generated_ids[0]", "99"]),
        ({"max_new_tokens": 124}, ["max_new_tokens", "124", "129", "128"]),
        ({"max_new_tokens": -1}, ["max_new_tokens", "-1"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
        ({"min_new_tokens": -2}, ["min_new_tokens", "-2"]),
        ({"max_draft_tokens": -3}, ["max_draft_tokens", "-3"]),
        ({"choice": -1}, ["choice", "-1"]),
        ({"choice": 1 << 63}, ["choice", str(1 << 63), str((1 << 31) - 1)]),
        ({"request_id": ""}, ["request_id"]),
        ({"request_id": "r" * 257}, ["request_id", "257", "256"]),
        ({"sampling": SamplingParams(temperature=-0.5)}, ["temperature", "-0.5"]),
        ({"sampling": SamplingParams(temperature=float("nan"))}, ["temperature", "nan"]),
        ({"sampling": SamplingParams(top_p=0.0)}, ["top_p", "0.0"]),
        ({"sampling": SamplingParams(top_k=-1)}, ["top_k", "-1"]),
        ({"sampling": SamplingParams(top_k=1 << 63)}, ["top_k", str(1 << 63), str((1 << 31) - 1)]),
        ({"sampling": SamplingParams(logprobs=21)}, ["logprobs", "21", "20"]),
    ],
)
def test_an_impossible_request_is_refused_with_field_value_and_limit(running, changes, words):
    engine = running(make_engine())
    inbox = Inbox()
    wanted = request("a", **changes)
    engine.submit(wanted, inbox)
    inbox.wait(wanted.request_id)
    delta = inbox.last(wanted.request_id)
    assert (delta.finish, delta.error_kind) == ("error", "request")
    assert delta.error is not None
    for word in words:
        assert word in delta.error
    engine.submit(request("good"), inbox)
    inbox.wait("good")


def test_a_request_beyond_the_kv_cache_is_refused(running):
    engine = running(make_engine(blocks=5))
    inbox = Inbox()
    engine.submit(request("a", prompt=10, output=12), inbox)
    inbox.wait("a")
    assert "KV cache of 20 tokens" in (inbox.last("a").error or "")


def test_a_second_submit_of_a_running_request_is_refused(running):
    engine = make_engine()
    first, second = Inbox(), Inbox()
    engine.submit(request("a"), first)
    engine.submit(request("a"), second)
    running(engine)
    first.wait("a")
    assert "already running" in (second.last("a").error or "")
    assert first.text("a") == expected("a")


def test_a_full_queue_says_overloaded(running):
    engine = make_engine(slots=1, max_waiting=1)
    inbox = Inbox()
    for name in "abc":
        engine.submit(request(name), inbox)
    running(engine)
    inbox.wait("a", "b", "c")
    assert (inbox.last("c").finish, inbox.last("c").error_kind) == ("error", "overloaded")
    assert inbox.finish("b") == "length"


def test_an_idle_engine_beats_without_work(running):
    beaten = threading.Event()

    class Counting(FakeRunner):
        def forward(self, plan: StepPlan) -> ForwardOutput:
            if plan.heartbeat and plan.step >= 3:
                beaten.set()
            return super().forward(plan)

    running(make_engine(Counting(4, 40, 4), heartbeat_s=0.01))
    assert beaten.wait(WAIT_S)


def test_a_failed_step_ends_every_request_with_an_error_and_the_loop_with_the_exception():
    engine = make_engine(Broken(4, 40, 4))
    inbox = Inbox()
    for name in "ab":
        engine.submit(request(name), inbox)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        engine.run()
    for name in "ab":
        assert (inbox.last(name).finish, inbox.last(name).error_kind) == ("error", "engine")
    engine.submit(request("late"), inbox)
    assert "stopped" in (inbox.last("late").error or "")


def test_stopping_ends_what_is_in_flight_with_an_error():
    engine = make_engine(slots=1)
    inbox = Inbox()
    engine.start()
    for name in "abcdef":
        engine.submit(request(name, output=100), inbox)
    engine.stop()
    inbox.wait(*"abcdef")
    assert inbox.last("f").error_kind == "engine"


@pytest.mark.parametrize("where", ["advance", "collect"])
def test_a_failing_proposer_costs_drafts_and_nothing_else(running, where):
    class Failing(Guesser):
        calls = 0

        def fail(self, name: str) -> None:
            self.calls += name == where
            if self.calls == 3:
                raise ValueError("a broken drafter")

        def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
            self.fail("advance")
            super().advance(progress, taps)

        def collect(self) -> float:
            self.fail("collect")
            return super().collect()

    engine = running(make_engine(proposer=Failing(0.5)))
    inbox = Inbox()
    for name in "abc":
        engine.submit(request(name, output=30), inbox)
    inbox.wait(*"abc")
    for name in "abc":
        assert inbox.text(name) == expected(name, output=30)


def test_random_aborts_and_deadlines_leak_nothing_and_change_no_other_text(running):
    engine = running(make_engine(proposer=Guesser(0.6), blocks=14, max_waiting=500))
    inbox = Inbox()
    rng = random.Random(2)
    wanted = {}
    for i in range(150):
        late = time.time() + rng.random() * 0.2 if i % 7 == 0 else None
        name = f"r{i}"
        wanted[name] = request(name, rng.randint(1, 20), 20, deadline=late, priority=i % 2)
        engine.submit(wanted[name], inbox)
        if rng.random() < 0.4:
            engine.abort(rng.choice(list(wanted)))
    inbox.wait(*wanted)
    for name, each in wanted.items():
        assert sum(delta.finish is not None for delta in inbox.deltas[name]) == 1
        text = inbox.text(name)
        assert text == MODEL.greedy(each.prompt_ids, len(text))
        assert len(text) == 20 or inbox.finish(name) in ("abort", "deadline")
    status = engine.status()
    assert (status.running, status.waiting, status.free_blocks) == (0, 0, status.total_blocks)
