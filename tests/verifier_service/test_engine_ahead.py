"""The engine when it launches steps before the one before is read: the same text, and nothing leaks."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cluster.contracts import Delta, SamplingParams
from tests.verifier_service.fake_runner import Broken, FakeRunner
from tests.verifier_service.test_engine import MODEL, Guesser, Inbox, expected, make_engine, request, running
from verifier_service.engine import Engine
from verifier_service.model.face import ForwardOutput
from verifier_service.plan import StepPlan
from verifier_service.proposers.plain import NoProposer
from verifier_service.sequence import Progress
from verifier_service.step_watch import LEAST_S
from verifier_service.tally import gap_share

assert running  # a fixture


def ahead(runner: FakeRunner | None = None, proposer=None, **limits) -> Engine:
    return make_engine(runner, proposer, runs_ahead=True, **limits)


class Bursts(Guesser):
    """Drafts in every other stretch of steps; whether it rests is said right, wrong, or at random."""

    steps = 0

    def __init__(self, says: str):
        super().__init__(0.7)
        self._says = says

    def resting(self) -> bool:
        rests = self.steps // 6 % 2 == 1
        return {"right": rests, "wrong": not rests, "random": self._random.random() < 0.5}[self._says]

    def collect(self) -> float:
        self.steps += 1
        if self.steps // 6 % 2 == 0:
            super().collect()
        return 0.0


@pytest.mark.parametrize("blocks", [40, 12])
@pytest.mark.parametrize("says", [None, "right", "wrong", "random"])
def test_text_is_the_models_own_with_drafts_in_bursts_and_under_preemption(running, says, blocks):
    engine = running(ahead(proposer=None if says is None else Bursts(says), blocks=blocks))
    inbox = Inbox()
    names = [f"r{i}" for i in range(12)]
    for i, name in enumerate(names):
        engine.submit(request(name, 1 + 2 * i, 12), inbox)
    inbox.wait(*names)
    for i, name in enumerate(names):
        assert inbox.text(name) == expected(name, 1 + 2 * i)
    counters = engine.status().counters
    assert counters["steps_ahead"] > 0
    assert (counters["preemptions"] > 0) == (blocks == 12)
    assert (counters["accepted_tokens"] > 0) == (says is not None)


def test_seeded_text_is_the_same_ahead_and_not_whatever_else_the_requests_want(running):
    """Penalties and log probabilities are the host's to see to, temperature and stop tokens are not."""
    wants: list[dict[str, Any]] = [
        {"sampling": SamplingParams(temperature=0.9)},
        {"sampling": SamplingParams(temperature=0.9, top_k=9, top_p=0.9)},
        {"sampling": SamplingParams(frequency_penalty=0.7), "max_new_tokens": 9},
        {"sampling": SamplingParams(logprobs=1), "max_new_tokens": 5},
        {"stop_token_ids": frozenset(range(0, 64, 7)), "min_new_tokens": 5, "max_new_tokens": 8},
        {"stop_token_ids": frozenset({expected("r5", 8, 20)[14]})},
    ]
    said = []
    for runs_ahead in (False, True):
        engine = running(make_engine(runs_ahead=runs_ahead, slots=6, blocks=60))
        inbox = Inbox()
        for i, want in enumerate(wants):
            engine.submit(request(f"r{i}", 3 + i, **{"output": 20, "seed": i, **want}), inbox)
        inbox.wait(*(f"r{i}" for i in range(len(wants))))
        said.append({name: (inbox.text(name), inbox.finish(name)) for name in inbox.deltas})
        assert (engine.status().counters["steps_ahead"] > 0) == runs_ahead
        assert (engine.status().counters["rows_in_vain"] > 0) == runs_ahead
        assert all(len(delta.logprobs or ()) == len(delta.token_ids) for delta in inbox.deltas["r3"])
    assert said[0] == said[1]


def test_a_step_is_launched_before_the_one_before_is_told(running):
    events: list[str] = []

    class Noting(FakeRunner):
        def forward(self, plan: StepPlan) -> ForwardOutput:
            events.append(f"launch {plan.step}")
            return super().forward(plan)

    class NotingInbox(Inbox):
        def __call__(self, deltas: list[Delta]) -> None:
            events.append(f"told {sum(e.startswith('told') for e in events) + 1}")
            super().__call__(deltas)

    engine = running(ahead(Noting(4, 40, 4)))
    inbox = NotingInbox()
    engine.submit(request("a", output=4), inbox)
    inbox.wait("a")
    assert events == [
        "launch 1", "launch 2", "told 1", "launch 3", "told 2", "launch 4", "told 3", "told 4",
    ]  # fmt: skip


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_waiting_for_requests_is_no_gap_between_steps(running, runs_ahead):
    engine = running(make_engine(runs_ahead=runs_ahead))
    inbox = Inbox()
    for name in "ab":
        engine.submit(request(name, output=1), inbox)
        inbox.wait(name)
    assert engine.status().counters["gap_seconds"] == 0
    engine.submit(request("c", output=9), inbox)
    inbox.wait("c")
    counters = engine.status().counters
    assert counters["gap_seconds"] > 0
    assert gap_share({"gap_seconds": 0.0, "step_seconds": 0.0}, counters) < 1


def test_the_gap_share_is_of_the_time_in_steps_between_two_accounts():
    before, after = {"gap_seconds": 1.0, "step_seconds": 10.0}, {"gap_seconds": 1.5, "step_seconds": 20.0}
    assert gap_share(before, after) == 0.05
    assert gap_share(before, before) == 0


def test_random_aborts_leak_nothing_and_change_no_other_text(running):
    engine = running(ahead(proposer=Bursts("random"), blocks=14, max_waiting=500))
    inbox = Inbox()
    rng = random.Random(4)
    wanted = {}
    for i in range(120):
        name = f"r{i}"
        wanted[name] = request(name, rng.randint(1, 20), 20, priority=i % 2)
        engine.submit(wanted[name], inbox)
        if rng.random() < 0.4:
            engine.abort(rng.choice(list(wanted)))
    inbox.wait(*wanted)
    for name, each in wanted.items():
        assert sum(delta.finish is not None for delta in inbox.deltas[name]) == 1
        text = inbox.text(name)
        assert text == MODEL.greedy(each.prompt_ids, len(text))
        assert len(text) == 20 or inbox.finish(name) == "abort"
    status = engine.status()
    assert (status.running, status.waiting, status.free_blocks) == (0, 0, status.total_blocks)


def test_a_request_without_finite_logits_ends_alone(running):
    class Sick(FakeRunner):
        def forward(self, plan: StepPlan) -> ForwardOutput:
            output = super().forward(plan)
            if plan.step == 5 and output.logits is not None:
                output.logits[0] = torch.nan
            return output

    engine = running(ahead(Sick(4, 40, 4)))
    inbox = Inbox()
    for name in "ab":
        engine.submit(request(name), inbox)
    inbox.wait(*"ab")
    assert {inbox.finish("a"), inbox.finish("b")} == {"error", "length"}
    for name in "ab":
        assert inbox.text(name) == expected(name)[: len(inbox.text(name))]


def test_a_step_that_fails_ends_all_that_is_under_way():
    engine = ahead(Broken(4, 40, 4))
    inbox = Inbox()
    for name in "ab":
        engine.submit(request(name), inbox)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        engine.run()
    for name in "ab":
        assert (inbox.last(name).finish, inbox.last(name).error_kind) == ("error", "engine")


def test_a_proposer_that_fails_is_renewed_only_while_nothing_is_under_way(running):
    """Tap layers change with the proposer: a step's taps must be of those that it is taken in with."""

    class Tapped(NoProposer):
        def __init__(self, layers: tuple[int, ...]):
            self.tap_layers = layers
            self.steps = 0

        def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
            self.steps += 1
            if self.tap_layers == (0,) and self.steps == 5:
                raise ValueError("a broken drafter")
            if self.tap_layers == (1,):
                renewed.set()
                wrong.extend([] if taps is not None else [self.steps])

    renewed = threading.Event()
    wrong: list[int] = []
    engine = running(
        make_engine(proposer=Tapped((0,)), make_proposer=lambda: Tapped((1,)), runs_ahead=True, max_waiting=500)
    )
    inbox = Inbox()
    for i in range(400):
        engine.submit(request(f"r{i}", output=100), inbox)
    assert renewed.wait(20), "the successor never came to its turn"
    inbox.wait("r0")
    assert wrong == []


def test_the_limit_of_the_longer_of_two_steps_under_way_holds():
    """A short step that is launched behind a long one must not make the long one count as stuck."""
    limits: list[float] = []

    class Watching(FakeRunner):
        def forward(self, plan: StepPlan) -> ForwardOutput:
            output = super().forward(plan)
            if plan.ahead:
                limits.append(engine.status().step_limit_s)
            return output

    engine = ahead(Watching(4, 40, 4))
    for _ in range(40):
        engine._watch.ended(1, 0.001)
        engine._watch.ended(9, 30.0)
    inbox = Inbox()
    engine.submit(request("a", prompt=9, output=4), inbox)
    engine.start()
    inbox.wait("a")
    engine.stop()
    assert limits[0] > 2 * LEAST_S, "behind the prompt"
    assert limits[1:] == [LEAST_S] * 2, "behind a single token"
