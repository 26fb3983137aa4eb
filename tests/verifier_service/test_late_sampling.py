"""Requests that the host works on beside others, in an engine that runs ahead: the same text, and no step waits."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from cluster.contracts import Delta, EngineInfo, EngineRequest, SamplingParams, TokenLogprobs
from tests.verifier_service.fake_runner import FakeRunner
from tests.verifier_service.oracle import PartlyRight
from tests.verifier_service.test_engine import Inbox, request, running
from tests.verifier_service.test_grammar import OPEN, SCHEMA, SHORT, VOCABULARY, compiler
from tests.verifier_service.test_sampling_features import sampling
from verifier_service.engine import Engine
from verifier_service.grammar.compiler import GrammarCompiler
from verifier_service.launch import Launched
from verifier_service.model.face import ForwardOutput
from verifier_service.plan import StepPlan
from verifier_service.proposers.face import Proposer
from verifier_service.proposers.plain import NoProposer
from verifier_service.scheduler import SchedulerLimits

assert running, compiler  # fixtures
OUTPUT = 12
SLOTS = 4

NEEDS: dict[str, dict[str, Any]] = {
    "penalties": {"sampling": SamplingParams(frequency_penalty=0.7, repetition_penalty=1.2)},
    "bias": {"sampling": SamplingParams(temperature=0.8, logit_bias=((3, 4.0),))},
    "min_new_tokens": {"stop_token_ids": frozenset({1}), "min_new_tokens": 30},
    "grammar": {"grammar": OPEN},
    "logprobs": {"sampling": SamplingParams(temperature=0.9, top_k=5, logprobs=3)},
}


class ComingAndGoing(PartlyRight):
    """Drafts in some stretches of steps; that it rests is said in others, now and then wrongly."""

    def __init__(self, texts: Mapping[str, Sequence[int]], seed: int):
        super().__init__(texts, VOCABULARY, longest=4, seed=seed)
        self._when = random.Random(seed)
        self._drafts = False

    def resting(self) -> bool:
        return not self._drafts or self._when.random() < 0.1

    def collect(self) -> float:
        if self._when.random() < 0.25:
            self._drafts = not self._drafts
        return super().collect() if self._drafts else 0.0


def make_engine(
    compiler: GrammarCompiler,
    *,
    runs_ahead: bool,
    runner: FakeRunner | None = None,
    draws: bool = False,
    proposer: Proposer | None = None,
    blocks: int = 60,
) -> Engine:
    limits = SchedulerLimits(slots=SLOTS, blocks=blocks, block_tokens=4, step_tokens=24, max_waiting=50)
    return Engine(
        runner or FakeRunner(SLOTS, blocks, 4, VOCABULARY, max_context=128, draws=draws),
        limits,
        EngineInfo("e", "f", 128, VOCABULARY, SLOTS, 8),
        proposer=proposer or NoProposer(),
        grammars=compiler,
        runs_ahead=runs_ahead,
    )


@dataclass(frozen=True)
class Said:
    text: list[int]
    finish: str | None
    logprobs: list[TokenLogprobs]


def said_by(engine: Engine, requests: Sequence[EngineRequest], aborts: Mapping[str, int]) -> dict[str, Said]:
    """aborts: how many tokens a request may have before it is aborted."""

    class Aborting(Inbox):
        def __call__(self, deltas: list[Delta]) -> None:
            super().__call__(deltas)
            for name in {delta.request_id for delta in deltas}:
                if name in aborts and len(self.text(name)) >= aborts[name]:
                    engine.abort(name)

    inbox = Aborting()
    for each in requests:
        engine.submit(each, inbox)
    engine.start()
    inbox.wait(*(each.request_id for each in requests))
    engine.stop()
    status = engine.status()
    assert (status.running, status.waiting, status.free_blocks) == (0, 0, status.total_blocks)
    return {
        name: Said(
            inbox.text(name),
            inbox.finish(name),
            [told for delta in deltas for told in delta.logprobs or ()],
        )
        for name, deltas in inbox.deltas.items()
    }


wanted = st.fixed_dictionaries(
    {
        "sampling": st.builds(
            lambda params, logprobs: replace(params, logprobs=logprobs), sampling, st.sampled_from([None, None, 0, 3])
        ),
        "min_new_tokens": st.sampled_from([0, 0, 4, OUTPUT]),
        "stop_token_ids": st.frozensets(st.integers(0, VOCABULARY - 1), max_size=6),
        "grammar": st.sampled_from([None, None, None, OPEN, SHORT, SCHEMA]),
    }
)


@settings(max_examples=30, deadline=None)
@given(
    mix=st.lists(wanted, min_size=6, max_size=6),
    aborts=st.dictionaries(st.sampled_from([f"r{i}" for i in range(6)]), st.integers(1, OUTPUT), max_size=2),
    blocks=st.sampled_from([60, 16]),
    draws=st.booleans(),
    seed=st.integers(0, 99),
)
def test_text_is_that_of_the_synchronous_engine_in_any_mix_of_features(compiler, mix, aborts, blocks, draws, seed):
    requests = [request(f"r{i}", 3 + 2 * i, OUTPUT, seed=i, **fields) for i, fields in enumerate(mix)]
    expected = said_by(make_engine(compiler, runs_ahead=False), requests, {})
    drafts = ComingAndGoing({name: said.text for name, said in expected.items()}, seed)
    engine = make_engine(compiler, runs_ahead=True, blocks=blocks, draws=draws, proposer=drafts)
    for name, said in said_by(engine, requests, aborts).items():
        if said.finish == "abort":
            count = len(said.text)
            assert (said.text, said.logprobs) == (expected[name].text[:count], expected[name].logprobs[:count])
        else:
            assert said == expected[name]
    assert engine.status().counters["steps_ahead"] > 0 or all(len(said.text) < 3 for said in expected.values())


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("needs", NEEDS)
def test_every_step_is_launched_ahead_beside_a_request_that_the_host_works_on(running, compiler, needs, draws):
    engine = make_engine(compiler, runs_ahead=True, draws=draws)
    inbox = Inbox()
    asked = [request("plain", output=30), request("needy", output=30, **{"seed": 3, **NEEDS[needs]})]
    for each in asked:
        engine.submit(each, inbox)
    running(engine)
    inbox.wait("plain", "needy")
    counters = engine.status().counters
    begins = 2 if needs == "grammar" else 1  # the grammar is compiled while the other runs: it may have to wait for it
    assert counters["steps"] - counters["steps_ahead"] <= begins


def test_tokens_that_depend_on_the_step_before_are_taken_once_that_is_read_and_before_it_is_told(running, compiler):
    events: list[str] = []

    class Noting(FakeRunner):
        def forward(self, plan: StepPlan) -> ForwardOutput:
            events.append(f"forward {plan.step}")
            return super().forward(plan)

        def feed(self, tokens: torch.Tensor) -> None:
            events.append("taken")
            super().feed(tokens)

    class NotingInbox(Inbox):
        def __call__(self, deltas: list[Delta]) -> None:
            events.append("told")
            super().__call__(deltas)

    engine = make_engine(compiler, runs_ahead=True, runner=Noting(SLOTS, 60, 4, VOCABULARY))
    inbox = NotingInbox()
    engine.submit(request("a", output=3, **NEEDS["penalties"]), inbox)
    running(engine)
    inbox.wait("a")
    assert events == ["forward 1", "taken", "forward 2", "taken", "told", "forward 3", "taken", "told", "told"]


def test_a_row_after_the_end_of_its_grammar_comes_to_nothing_and_ends_nothing_else(running, compiler):
    """The step after the last token is launched before anybody knows that it was the last."""
    engine = make_engine(compiler, runs_ahead=True)
    alone = said_by(make_engine(compiler, runs_ahead=False), [request("a", output=40)], {})["a"]
    said = said_by(engine, [request("a", output=40), request("b", output=40, grammar=SHORT)], {})
    assert said["a"] == alone
    assert said["b"].finish == "stop"
    assert engine.status().counters["rows_in_vain"] == 1


def test_what_the_device_waits_for_before_late_tokens_counts_as_a_gap_and_not_as_work(running, compiler, monkeypatch):
    slow = 100.0

    class Slow(Launched):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, (value[0], value[1] + slow) if name == "late" and value else value)

    monkeypatch.setattr("verifier_service.launch.Launched", Slow)
    engine = running(make_engine(compiler, runs_ahead=True))
    inbox = Inbox()
    engine.submit(request("a", output=9, **NEEDS["penalties"]), inbox)
    inbox.wait("a")
    counters = engine.status().counters
    assert counters["gap_seconds"] > slow * counters["steps_ahead"] > 0
    assert counters["forward_seconds"] < 0


@pytest.mark.parametrize("needs", NEEDS)
def test_only_rows_that_the_host_works_on_have_their_logits_shown(running, compiler, needs):
    runner = FakeRunner(SLOTS, 60, 4, VOCABULARY, max_context=128, draws=True)
    engine = running(make_engine(compiler, runs_ahead=True, runner=runner))
    inbox = Inbox()
    asked = [
        request("plain", output=30),
        request("needy", output=30, **{"seed": 3, **NEEDS[needs]}),
        request("sampled", output=30, sampling=SamplingParams(temperature=0.9, top_p=0.9)),
    ]
    for each in asked:
        engine.submit(each, inbox)
    inbox.wait("plain", "needy", "sampled")
    assert all(plan.draws is not None for plan in runner.plans)
    shown = [rows for plan in runner.plans for rows in plan.shown]
    assert max(len(plan.shown) for plan in runner.plans) == 1
    assert {(rows.count, rows.late) for rows in shown} == {(1, needs != "logprobs")}
