"""Speculation control against simulated engines: it finds the gain where drafting pays, and bounds the loss elsewhere.

`python -m tests.verifier_service.control_scenarios` prints the whole table.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.verifier_service.control_scenarios import (
    BAD,
    CPU,
    FLAPPING,
    GARBAGE,
    GOOD,
    GPU,
    LATE,
    MANY,
    MOST,
    MUTE,
    SLOW,
    TEXTS,
    Costs,
    Drafter,
    Engine,
    Outcome,
    Scenario,
)
from verifier_service.allowance import FIRST, SHARE
from verifier_service.control import SpeculationControl

NOISE = 0.004  # of simulated steps, in the mean of a run
WORTHWHILE = 1.15


def run(costs: Costs, drafter: Drafter, text: str, *sizes: int, steps: int = 4000, seed: int = 0) -> Outcome:
    return Engine(Scenario(costs, drafter, text, sizes, steps), SpeculationControl(MOST), seed).run()


@pytest.mark.parametrize("costs", [CPU, GPU], ids=lambda costs: costs.name)
@pytest.mark.parametrize("size", [1, 4, 32, 128])
@pytest.mark.parametrize("drafter", [BAD, GARBAGE, SLOW, LATE, FLAPPING, MANY], ids=lambda drafter: drafter.name)
def test_in_the_long_run_no_drafter_costs_more_than_two_percent(costs, size, drafter):
    text = "hard" if drafter is FLAPPING else "alternating"
    assert run(costs, drafter, text, size).over_plain >= 0.98 - NOISE


@pytest.mark.parametrize("costs", [CPU, GPU], ids=lambda costs: costs.name)
@pytest.mark.parametrize("size", [1, 8, 32])
@pytest.mark.parametrize("drafter", [BAD, GARBAGE, SLOW, LATE, MANY], ids=lambda drafter: drafter.name)
def test_a_short_run_loses_no_more_than_the_first_allowance_and_one_ask(costs, size, drafter):
    steps = 300
    out = run(costs, drafter, "hard", size, steps=steps)
    lost = steps * (1 - out.over_plain)  # in plain steps' time
    assert lost <= FIRST + (SHARE + NOISE) * steps + MOST


@pytest.mark.parametrize("costs", [CPU, GPU], ids=lambda costs: costs.name)
@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("drafter", [GOOD, MUTE], ids=lambda drafter: drafter.name)
@pytest.mark.parametrize("text", TEXTS)
def test_where_drafting_pays_it_comes_near_the_best_fixed_number_of_drafts(costs, size, drafter, text):
    out = run(costs, drafter, text, size, steps=4000 if costs is CPU else 2000)
    assert out.over_plain >= 0.98 - NOISE
    if out.best_tokens > WORTHWHILE * out.plain_tokens:
        assert out.over_best >= 0.9


def test_many_requests_are_drafted_for_where_it_pays_though_probes_ask_for_few():
    assert run(GPU, MUTE, "easy", 32, steps=1000).over_best > 0.9


def test_with_confidence_easy_requests_are_drafted_for_and_hard_ones_beside_them_are_not():
    assert run(GPU, GOOD, "mixed", 32, steps=1000).over_best > 1.1, "better than one number for all"


def test_it_follows_the_batch_as_it_grows_and_shrinks():
    sizes = 1, 8, 2, 32, 4, 16, 1, 32
    assert run(GPU, GOOD, "mixed", *sizes, steps=2000).over_best > 0.95
    assert run(CPU, GARBAGE, "mixed", *sizes).over_plain > 0.98 - NOISE


@settings(max_examples=10, deadline=None)
@example(plain=0.09375, row=0.25, wait=0.0, right=0.0, tells=False, requests=8, seed=3)  # a step's rows cost 14 others
@given(
    plain=st.floats(0.001, 0.1),
    row=st.floats(0.0, 0.3),
    wait=st.floats(0.0, 3.0),
    right=st.floats(0.0, 1.0),
    tells=st.booleans(),
    requests=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 1000),
)
def test_whatever_the_machine_and_the_drafter_throughput_stays_near_plain(
    plain, row, wait, right, tells, requests, seed
):
    costs = Costs("any", lambda n: plain, lambda n, d: row * plain * d, lambda m: wait * plain)
    drafter = Drafter("any", right=right, tells=tells, sure=0.9)
    assert run(costs, drafter, "alternating", requests, steps=6000, seed=seed).over_plain >= 0.975 - NOISE
