"""Promise 3 in virtual time: with any drafter, at any load, throughput stays at plain decoding's.

By the policies that serve, all of them: the same proposer, control, patience and scheduler as in an engine.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.simulate.drafters import Fault
from paceline.simulate.run import Load, simulate
from tests.paceline.simulate.worlds import DRAFTING, SETUP, LinearDrafter, LinearTarget, load, prior_of

FAULTS = {
    "dies": Fault(dies_at=3.0),
    "stalls for good": Fault(stalls_at=3.0),
    "stalls for a while": Fault(stalls_at=3.0, stalls_s=2.0),
    "is slow": Fault(slow=10.0),
    "is as good as dead": Fault(slow=100.0),
    "drafts garbage": Fault(garbage=True),
}
LOADS = {  # prompt, output, requests at once
    "one request": (32, 400, 1),
    "some requests": (32, 400, 8),
    "many requests": (32, 400, 32),
    "long prompts": (512, 128, 8),
}
# 2% for good; the rest of these 20 seconds' share is what is lost once, before anything is known of a drafter.
LEAST = 0.97
SECONDS = 20.0
SETUP_WITH_HOST = replace(SETUP, target=LinearTarget(host=True))


@pytest.fixture(scope="module")
def plain() -> dict[str, float]:
    """Tokens a second, by load."""
    return {name: simulate(SETUP_WITH_HOST, made(name), drafters=0).tokens_per_s for name in LOADS}


def made(name: str) -> Load:
    prompt, output, requests = LOADS[name]
    return load(requests, tokens=3.0, seconds=SECONDS, prompt=prompt, output=output)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", LOADS)
def test_throughput_stays_at_plain_decodings_when_the_only_drafter(name, fault, plain):
    figures = simulate(SETUP_WITH_HOST, made(name), faults=[FAULTS[fault]])
    assert figures.tokens_per_s >= LEAST * plain[name]


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_a_prior_from_another_machine_costs_no_more(scale, plain):
    """Drafts and steps ten times as fast, or as slow, as they are."""
    setup = replace(SETUP_WITH_HOST, drafting=replace(DRAFTING, prior=prior_of(LinearTarget(), LinearDrafter(), scale)))
    for name, fault in (("some requests", "is slow"), ("many requests", "drafts garbage")):
        figures = simulate(setup, made(name), faults=[FAULTS[fault]])
        assert figures.tokens_per_s >= LEAST * plain[name]
    assert simulate(setup, made("one request")).tokens_per_s > 1.5 * plain["one request"]


def test_with_a_prior_steps_beside_a_burst_of_prompts_do_not_pass_for_plain_ones():
    prior = prior_of(LinearTarget(), LinearDrafter())
    setup = replace(SETUP_WITH_HOST, drafting=replace(DRAFTING, prior=prior))
    burst = load(32, tokens=3.0, seconds=SECONDS, prompt=512, output=128)
    least = LEAST * simulate(setup, burst, drafters=0).tokens_per_s
    assert simulate(setup, burst, faults=[FAULTS["is slow"]]).tokens_per_s >= least


@pytest.mark.parametrize("name", ["one request", "some requests"])
def test_drafting_comes_back_after_a_stall(name, plain):
    stalled = simulate(SETUP_WITH_HOST, made(name), faults=[FAULTS["stalls for a while"]])
    dead = simulate(SETUP_WITH_HOST, made(name), faults=[FAULTS["stalls for good"]])
    assert stalled.tokens_per_s > 1.2 * plain[name]
    assert stalled.asks > 2 * dead.asks


def test_a_step_without_prefill_is_soon_looked_for_where_a_burst_of_prompts_left_none():
    burst = load(32, tokens=3.0, seconds=SECONDS, prompt=512, output=128)
    plain = simulate(SETUP_WITH_HOST, burst, drafters=0).tokens_per_s
    slow = simulate(SETUP_WITH_HOST, burst, faults=[FAULTS["is slow"]])
    assert slow.tokens_per_s >= 0.93 * plain  # of 20 seconds, so much is lost before the first such step
    assert simulate(SETUP_WITH_HOST, burst).tokens_per_s > 1.1 * plain
