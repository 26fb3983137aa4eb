"""Speculation control, call by call."""

from __future__ import annotations

import time

import pytest

from verifier_service.allowance import ANEW_EVERY
from verifier_service.control import (
    DISTRUST,
    FIRST_PAUSE,
    PLAIN_FIRST,
    PROBE_LEAST,
    PROBE_REQUESTS,
    PROBE_ROWS,
    SpeculationControl,
    Trust,
)

MOST = 7


def warmed(requests: int = 1) -> SpeculationControl:
    """Past the first plain steps of a second each."""
    control = SpeculationControl(MOST)
    for _ in range(PLAIN_FIRST):
        assert control.choose(requests) == 0
        control.step(requests, 0, 0, 1.0)
    return control


def ask(
    control: SpeculationControl, requests: int, right: float, wait: float = 0.1, sure: float = 0.9, each: float = 0.01
) -> int:
    """One step: choose, ask, verify; each draft costs `each` s. Drafts asked for of each request."""
    drafts = control.choose(requests)
    asked = min(requests, control.ask_at_most) if drafts else 0
    drafted = accepted = 0
    if asked:
        answers, trusts = [(sure,) * drafts] * asked, [Trust() for _ in range(asked)]
        kept = control.kept(trusts, answers)
        control.waited(requests, asked, wait)
        for trust, answer, count in zip(trusts, answers, kept):
            control.verified(trust, answer[:count], count, int(right * count))
        drafted, accepted = sum(kept), sum(int(right * count) for count in kept)
    control.step(requests, drafted, accepted, 1.0 + each * drafted)
    return drafts


def test_plain_decoding_is_measured_before_the_first_drafts_of_each_batch_size():
    control = warmed()
    assert control.choose(1) == MOST
    assert [control.choose(9) for _ in range(PLAIN_FIRST)] == [0] * PLAIN_FIRST


def test_where_every_step_holds_prefill_drafting_starts_all_the_same_and_is_left_if_it_loses():
    for right, drafts_in_the_end in ((1.0, True), (0.0, False)):
        control, asked = SpeculationControl(MOST), []
        for _ in range(300):
            drafts = control.choose(2)
            if drafts:
                answers = [(0.9,) * drafts] * 2
                kept = control.kept([Trust(), Trust()], answers)
                control.waited(2, 2, 0.5)
                for answer, count in zip(answers, kept):
                    control.verified(Trust(), answer[:count], count, int(right * count))
            drafted = sum(kept) if drafts else 0
            control.step(2, drafted, int(right * drafted), 1.0, prefilled=True)
            asked.append(drafts)
        assert any(asked[-30:]) == drafts_in_the_end


@pytest.mark.parametrize("requests", [1, 4, 64])
def test_a_probe_is_short_asks_few_and_rests_longer_each_time_it_loses(requests):
    control = warmed(requests)
    asks = [ask(control, requests, right=0.0, wait=0.7) for _ in range(1500)]
    assert set(asks) == {0, MOST}
    probes = [len(run) for run in "".join("x" if drafts else " " for drafts in asks).split()]
    rests = [len(run) for run in "".join(" " if drafts else "." for drafts in asks).split()]
    assert 3 <= len(probes) <= 12
    longest = max(PROBE_LEAST, PROBE_ROWS // requests)
    assert probes[0] <= 3 * longest, "until the drafter's word counts for nothing"
    assert max(probes[1:]) <= longest
    assert FIRST_PAUSE <= rests[0] < rests[1] < rests[2]


def test_the_account_ends_drafting_that_loses_whatever_the_estimates_say():
    control = warmed()
    asked = 0
    while ask(control, 1, right=1.0, wait=30.0):  # all is right, and much too slow
        asked += 1
    assert asked <= 2


def test_what_is_learned_at_one_batch_size_needs_no_probe_at_another():
    control = warmed()
    for _ in range(100):
        ask(control, 1, right=1.0)
    for _ in range(PLAIN_FIRST):
        assert ask(control, 4, right=1.0) == 0
    assert ask(control, 4, right=1.0) > 0
    assert not control.probing


def test_a_drafter_that_turns_bad_is_left_and_one_that_turns_good_is_found_again():
    control = warmed()
    assert sum(ask(control, 1, right=1.0) > 0 for _ in range(200)) > 180
    for _ in range(300):
        ask(control, 1, right=0.0, wait=0.5)
    assert sum(ask(control, 1, right=0.0, wait=0.5) > 0 for _ in range(200)) < 20
    for _ in range(1500):
        ask(control, 1, right=1.0)
    assert sum(ask(control, 1, right=1.0) > 0 for _ in range(200)) > 180


def test_gains_at_one_batch_size_pay_for_no_probes_at_another_where_drafting_does_not_pay():
    control, asked = warmed(1), 0
    for _ in range(30):
        for _ in range(40):
            ask(control, 1, right=1.0)
        asked += sum(ask(control, 8, right=1.0, wait=9.0) > 0 for _ in range(40))
    assert asked < 20


def test_of_each_answer_what_is_sure_enough_is_verified():
    control = warmed()
    for _ in range(200):
        ask(control, 1, right=1.0, sure=0.9)
    sure, unsure = (0.95,) * 4, (0.1,) * 4
    first, second = control.kept([Trust(), Trust()], [sure, unsure])
    assert first == 4
    assert second < 2


def test_confidence_counts_for_what_it_has_been_worth():
    control = warmed()
    before = control.kept([Trust()], [(0.95,) * 4])
    for _ in range(100):
        control.verified(Trust(), (0.95,) * 4, 4, 0)
    assert before == [4]
    assert control.kept([Trust()], [(0.95,) * 4]) == [0]


def test_a_request_whose_drafts_are_not_worth_asking_for_is_left_out_for_a_while():
    control, hard = warmed(8), Trust()
    for _ in range(50):
        ask(control, 8, right=1.0, wait=0.5)
    while control.trusts(hard):
        drafts = control.choose(8)
        control.kept([Trust(), hard], [(0.95,) * drafts, (0.01,) * drafts])
    assert control.choose(8, willing=0) == 0
    for _ in range(DISTRUST):
        control.choose(8)
    assert control.trusts(hard)


def test_a_new_drafter_gets_its_chance_at_once_but_not_one_after_the_other():
    control = warmed()
    for _ in range(400):
        ask(control, 1, right=0.0, wait=1.0)
    assert control.rests(1)
    control.renew()
    assert ask(control, 1, right=0.0, wait=1.0) == MOST
    for _ in range(100):
        ask(control, 1, right=0.0, wait=1.0)
    control.renew()
    assert ask(control, 1, right=0.0) == 0
    for _ in range(int(ANEW_EVERY)):
        ask(control, 1, right=0.0, wait=1.0)
    control.renew()
    assert ask(control, 1, right=0.0) == MOST


def test_the_first_wait_for_a_new_drafter_may_be_long():
    control = warmed()
    control.renew()
    ask(control, 1, right=1.0, wait=1000.0)
    for _ in range(20):
        assert ask(control, 1, right=1.0) > 0


def test_one_very_late_answer_does_not_end_drafting():
    control = warmed()
    for _ in range(200):
        ask(control, 1, right=1.0)
    ask(control, 1, right=1.0, wait=1000.0)
    assert sum(ask(control, 1, right=1.0) > 0 for _ in range(10)) >= 9


@pytest.mark.parametrize("requests", [16, 256])
def test_a_drafter_that_was_slow_for_a_while_is_asked_for_all_again(requests):
    """Probes ask for few: what asking for all takes is known from the time when it was slow."""
    control = warmed(requests)
    for wait, steps in ((0.05, 600), (10.0, 200), (0.05, 1000)):
        for _ in range(steps):
            ask(control, requests, 1.0, wait, each=0.0005)
    asked = [(ask(control, requests, 1.0, 0.05, each=0.0005), control.ask_at_most) for _ in range(100)]
    assert sum(drafts > 0 and most >= requests for drafts, most in asked) > 90


def test_a_drafter_that_is_slow_only_for_many_costs_no_more_than_the_account_has():
    requests, lost = 32, 0.0
    control = warmed(requests)
    for _ in range(4000):
        drafts = control.choose(requests)
        asked = min(requests, control.ask_at_most) if drafts else 0
        wait, drafted = (50.0 if asked > PROBE_REQUESTS else 0.01) if asked else 0.0, 0
        if asked:
            drafted = sum(control.kept([Trust() for _ in range(asked)], [(0.9,) * drafts] * asked))
            control.waited(requests, asked, wait)
            control.verified(Trust(), (0.9,) * drafts, drafts, drafts)
        control.step(requests, drafted, drafted, 1.0)
        lost += wait - drafted / requests
    assert lost < 150


def test_a_wait_is_no_longer_than_drafts_can_be_worth():
    assert warmed().longest_wait(1) == pytest.approx(MOST * 1.0)
    assert SpeculationControl(MOST).longest_wait(1) == float("inf")


def test_a_step_of_256_requests_takes_the_control_less_than_two_milliseconds():
    control, trusts, answers = warmed(256), [Trust() for _ in range(256)], [(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)] * 256
    spent = []
    for _ in range(60):
        began = time.thread_time()
        control.choose(256)
        kept = control.kept(trusts, answers)
        for trust, answer, count in zip(trusts[::5], answers[::5], kept[::5]):
            control.verified(trust, answer, count, min(2, count))
        control.waited(256, 256, 0.01)
        control.step(256, sum(kept), 2 * len(kept), 1.0)
        spent.append(time.thread_time() - began)
    assert sorted(spent)[len(spent) // 4] < 2e-3
    print(f"{1e6 * sorted(spent)[len(spent) // 2]:.0f} us")
