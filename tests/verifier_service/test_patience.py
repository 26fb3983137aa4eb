"""How often a drafter that answers late is asked."""

from __future__ import annotations

import pytest

from verifier_service.proposers.patience import DOUBLINGS, Patience

STEP_S, SOFT_S = 0.01, 0.25


def waited_share(in_time_before_each_miss: int, seconds: float = 2000.0) -> float:
    """Of the time, spent in waits that came to nothing; other steps take STEP_S."""
    patience, now, lost, streak = Patience(SOFT_S), 0.0, 0.0, 0
    while now < seconds:
        now += STEP_S
        if not patience.may_ask(now):
            continue
        if streak < in_time_before_each_miss:
            streak += 1
            patience.kept()
        else:
            streak, now, lost = 0, now + SOFT_S, lost + SOFT_S
            patience.missed(now, SOFT_S)
    return lost / now


@pytest.mark.parametrize("in_time", [0, 1, 3])
def test_a_drafter_that_is_often_late_costs_little_in_the_long_run(in_time):
    assert waited_share(in_time) < 0.02


def test_a_drafter_that_is_seldom_late_is_asked_again_after_one_deadline():
    patience = Patience(SOFT_S)
    for _ in range(5):
        for _ in range(20):
            patience.kept()
        patience.missed(10.0, SOFT_S)
        assert not patience.may_ask(10.0 + 0.9 * SOFT_S)
        assert patience.may_ask(10.0 + SOFT_S)


def test_a_pause_is_bounded_and_a_new_drafter_is_asked_at_once():
    patience = Patience(SOFT_S)
    for _ in range(100):
        patience.missed(0.0, SOFT_S)
    assert patience.may_ask(2**DOUBLINGS * SOFT_S)
    patience.renew()
    assert patience.may_ask(0.0)
