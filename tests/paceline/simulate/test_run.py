"""Runs in virtual time: what they give can be worked out, and the same seed gives the same run."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest

from paceline.simulate.drafters import Fault, Guess
from paceline.simulate.run import simulate
from tests.paceline.simulate.worlds import BLOCK, SETUP, LinearDrafter, drafting, load, survival


def test_plain_decoding_gives_what_its_steps_take():
    figures = simulate(SETUP, load(4, output=2000, prompt=1, warm_up_s=1.0), drafters=0)
    step_s = SETUP.target.step_s(4, 4, 0, 0)
    assert figures.tokens_per_s == pytest.approx(4 / step_s, rel=0.01)
    assert figures.token_p50 == pytest.approx(step_s, rel=0.01)
    assert (figures.asks, figures.drafted_steps, figures.tau, figures.waste) == (0, 0.0, None, None)


def test_a_fixed_number_of_drafts_gives_what_step_draft_and_link_take():
    figures = simulate(drafting(adaptive=False), load(output=2000, prompt=1, warm_up_s=1.0))
    per_step = SETUP.target.step_s(1, BLOCK, 0, 0) + LinearDrafter().draft_s(1, BLOCK, 0) + LinearDrafter.round_trip_s
    assert figures.tau == pytest.approx(4.0, rel=0.05)
    assert figures.tokens_per_s == pytest.approx(4.0 / per_step, rel=0.05)
    assert figures.waste == pytest.approx(1 - 3 / 7, rel=0.1)
    assert figures.busy == pytest.approx(LinearDrafter().draft_s(1, BLOCK, 0) / per_step, rel=0.1)


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    first, again, other = (
        simulate(SETUP, load(3, seconds=2.0, certainty=0.8, seed=seed), verifiers=2) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.tokens_per_s != other.tokens_per_s


def test_requests_arrive_at_their_rate_whatever_is_running():
    figures = simulate(SETUP, load(None, rate=5.0, output=50, seconds=30.0), verifiers=2)
    assert figures.tokens_per_s == pytest.approx(5.0 * 50, rel=0.15)
    assert figures.first_p50 == pytest.approx(0.012, abs=0.01)


def test_more_than_may_wait_are_refused_and_counted():
    setup = replace(SETUP, limits=replace(SETUP.limits, slots=1, max_waiting=2))
    figures = simulate(setup, load(None, rate=50.0), drafters=0)
    assert figures.refused > 100


def test_verifiers_that_share_a_drafter_draft_better_with_one_each():
    slow = LinearDrafter(base=10e-3)
    one, two = (
        simulate(drafting(times=slow), load(4, tokens=7.0), drafters=drafters, verifiers=2) for drafters in (1, 2)
    )
    assert one.tokens_per_s < 0.95 * two.tokens_per_s


def test_requests_beyond_a_drafters_room_decode_plainly():
    few = simulate(drafting(slots=2, adaptive=False), load(8))
    all_ = simulate(drafting(slots=8, adaptive=False), load(8))
    assert 0 < few.asks < 0.5 * all_.asks


def test_after_a_death_the_others_drafter_takes_over():
    fault = Fault(dies_at=1.0)
    alone = simulate(SETUP, load(seconds=10.0), faults=[fault])
    helped = simulate(SETUP, load(seconds=10.0), drafters=2, faults=[fault])
    assert helped.asks > 2 * alone.asks
    assert simulate(SETUP, load(seconds=10.0), drafters=2).asks > helped.asks  # nothing is asked before it is noticed


def test_drafts_that_come_after_the_wait_for_them_are_counted_late():
    late = simulate(drafting(adaptive=False, soft_deadline_s=0.005), load(), faults=[Fault(slow=20.0)])
    assert late.missed > 5
    assert late.late == pytest.approx(late.missed, abs=1)


def test_a_guess_is_right_as_often_as_assumed_and_its_confidence_is_calibrated():
    guess = Guess(survival(4.0), certainty=0.8, seed=3)
    blocks = [guess.block(f"v/{number}/0", base, BLOCK - 1) for number in range(40) for base in range(100)]
    for position in range(BLOCK - 1):
        stands = fmean(right > position for right, _ in blocks)
        assert stands == pytest.approx(survival(4.0)[position], abs=0.03)
    known = [(confidence[0], right > 0) for right, confidence in blocks]
    sure = [stands for confidence, stands in known if confidence > 0.8]
    unsure = [stands for confidence, stands in known if confidence <= 0.8]
    assert fmean(sure) == pytest.approx(fmean(c for c, _ in known if c > 0.8), abs=0.03)
    assert fmean(unsure) == pytest.approx(fmean(c for c, _ in known if c <= 0.8), abs=0.03)
