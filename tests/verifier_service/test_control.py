"""Speculation control against simulated machines and drafters: never much worse than plain, and near the best k."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier_service.control import (
    FIRST_PAUSE,
    LONGEST_DEBT,
    PLAIN_FIRST,
    PROBE_REQUESTS,
    PROBE_ROWS,
    SpeculationControl,
)


@dataclass
class Machine:
    """plain: seconds of a plain step; row: of each drafted token; wait: for drafts of all requests, of which a share
    `flat` is due for any number of them; right: P(draft i | before it)."""

    plain: float
    row: float
    wait: float
    right: float
    flat: float = 1.0

    def run(self, control: SpeculationControl, requests: int, steps: int, seed: int = 0) -> float:
        """Tokens a second under the control."""
        rng, drafts, asked, tokens, seconds = random.Random(seed), 0, 0, 0, 0.0
        for _ in range(steps):
            forward = (self.plain + self.row * drafts * asked) * rng.uniform(0.97, 1.03)
            for request in range(requests):
                accepted = 0
                while request < asked and accepted < drafts and rng.random() < self.right:
                    accepted += 1
                tokens += 1 + accepted
                if drafts and request < asked:
                    control.verified(drafts, accepted)
            control.step(requests, drafts * asked, forward)
            drafts = control.choose(requests)
            asked = min(requests, control.ask_at_most) if drafts else 0
            wait = self.wait * (self.flat + (1 - self.flat) * asked / requests) if drafts else 0.0
            if drafts:
                control.waited(requests, wait)
            seconds += forward + wait
        return tokens / seconds

    def rate(self, drafts: int, requests: int) -> float:
        expected = sum(self.right**i for i in range(drafts + 1))
        return requests * expected / (self.plain + self.row * drafts * requests + (self.wait if drafts else 0))


@settings(max_examples=25, deadline=None)
@given(
    row=st.floats(0.0, 0.12),
    wait=st.floats(0.0, 1.5),
    right=st.floats(0.0, 0.95),
    requests=st.sampled_from([1, 4]),
    seed=st.integers(0, 1000),
)
def test_whatever_the_drafter_throughput_stays_within_two_percent_of_plain_decoding(row, wait, right, requests, seed):
    machine = Machine(plain=1.0, row=row, wait=wait, right=right)
    got = machine.run(SpeculationControl(7), requests, 4000, seed)
    assert got >= 0.98 * 0.985 * machine.rate(0, requests)  # the second factor: noise of the simulated steps


@pytest.mark.parametrize(
    ("row", "wait", "right"), [(0.01, 0.1, 0.9), (0.05, 0.3, 0.7), (0.1, 0.2, 0.6), (0.0, 0.5, 0.5)]
)
@pytest.mark.parametrize("requests", [1, 4])
def test_it_comes_close_to_the_best_fixed_number_of_drafts(row, wait, right, requests):
    machine = Machine(plain=1.0, row=row, wait=wait, right=right)
    best = max(machine.rate(k, requests) for k in range(8))
    assert machine.run(SpeculationControl(7), requests, 2000) >= 0.9 * best


@pytest.mark.parametrize("flat", [0.0, 0.5, 1.0])
def test_many_requests_are_drafted_for_where_it_pays_though_probes_ask_for_few(flat):
    machine = Machine(plain=1.0, row=0.001, wait=0.3, right=0.8, flat=flat)
    assert machine.run(SpeculationControl(7), 64, 600) >= 0.85 * max(machine.rate(k, 64) for k in range(8))


@pytest.mark.parametrize("requests", [1, 4])
@pytest.mark.parametrize("wait", [10.0, 20.0])
def test_a_drafter_that_takes_many_steps_and_is_never_right_costs_two_percent_in_the_long_run(requests, wait):
    machine, control = Machine(plain=1.0, row=0.02, wait=wait, right=0.0), SpeculationControl(7)
    machine.run(control, requests, 10000)
    assert machine.run(control, requests, 30000) >= 0.98 * machine.rate(0, requests)


@pytest.mark.parametrize("slow", [5.0, 50.0])
def test_drafting_survives_a_slow_first_ask_of_all_requests(slow):
    """It has to bring the drafter the features of those that the probe left out."""
    control, asked, full = warmed(64), 0, 0
    for _ in range(8000):
        drafts = control.choose(64)
        if drafts:
            full += (asked := min(64, control.ask_at_most)) > PROBE_REQUESTS
            control.waited(64, slow if full == 1 and asked > PROBE_REQUESTS else 0.1)
            control.verified(drafts, drafts)
        control.step(64, drafts * asked if drafts else 0, 1.0)
    assert full > 4000, "it pays in every step"


@pytest.mark.parametrize("flat", [0.0, 1.0])
def test_a_short_life_with_many_requests_loses_little_to_a_drafter_that_does_not_pay(flat):
    machine = Machine(plain=1.0, row=0.012, wait=3.0, right=0.7, flat=flat)
    got = machine.run(SpeculationControl(7), 64, 600)
    assert got >= 0.97 * machine.rate(0, 64)


def test_other_batch_sizes_are_probed_only_when_the_last_losses_are_small_against_the_time_since():
    control = SpeculationControl(7)
    bad = Machine(plain=1.0, row=0.05, wait=1.0, right=0.0)
    bad.run(control, 64, 60)
    for n in (1, 2, 4, 16, 32):
        for _ in range(PLAIN_FIRST + 2):
            assert control.rests(n), "the next step need not wait for this choice"
            assert control.choose(n) == 0
    bad.run(control, 64, 3000)
    assert not control.rests(1)
    assert any(control.choose(1) for _ in range(2))


def test_a_drafter_that_turns_bad_is_left_and_one_that_turns_good_is_found_again():
    control = SpeculationControl(7)
    good, bad = Machine(1.0, 0.02, 0.2, 0.85), Machine(1.0, 0.02, 0.2, 0.0)
    assert good.run(control, 1, 500) > 1.5
    bad.run(control, 1, 600)
    assert bad.run(control, 1, 200) > 0.95
    good.run(control, 1, 3000)
    assert good.run(control, 1, 500) > 1.5


def test_a_new_drafter_gets_its_chance_at_once():
    control = SpeculationControl(7)
    Machine(1.0, 0.02, 0.2, 0.0).run(control, 1, 300)
    assert control.choose(1) == 0
    control.renew()
    assert control.choose(1) == 7


def test_unverified_positions_are_censored_not_rejected():
    control = SpeculationControl(4)
    for _ in range(50):
        control.verified(4, 4)
    before = control.expected(4)
    for _ in range(50):
        control.verified(2, 2)
    assert control.expected(4) == before == pytest.approx(5.0)
    control.verified(4, 1)
    assert control.expected(1) == pytest.approx(2.0)
    assert control.expected(2) < 3.0


def test_plain_decoding_is_measured_before_the_first_drafts_and_batch_sizes_do_not_mix():
    control = SpeculationControl(7)
    assert [control.choose(1) for _ in range(3)] == [0, 0, 0]
    for _ in range(3):
        control.step(1, 0, 1.0)
    assert control.choose(1) == 7
    assert control.choose(9) == 0


def warmed(requests: int = 1) -> SpeculationControl:
    """Past the first plain steps of a second each."""
    control = SpeculationControl(7)
    for _ in range(PLAIN_FIRST):
        assert control.choose(requests) == 0
        control.step(requests, 0, 1.0)
    return control


def test_where_every_step_holds_prefill_drafting_starts_all_the_same():
    control = SpeculationControl(7)
    assert [control.choose(2) for _ in range(PLAIN_FIRST)] == [0] * PLAIN_FIRST
    for _ in range(50):  # no step is ever measured
        assert control.choose(2) == 7
        control.waited(2, 0.1)


def test_a_probe_lasts_until_so_many_asks_were_sent():
    control = warmed()
    control.verified(7, 0)
    assert {control.choose(1) for _ in range(100)} == {7}
    for _ in range(PROBE_ROWS):
        control.waited(1, 1.0)
    assert control.choose(1) == 0


def test_a_wait_that_ended_at_its_deadline_ends_a_probe_but_is_no_sample():
    control = warmed()
    for _ in range(PROBE_ROWS):
        assert control.choose(1) == 7
        control.verified(7, 7)
        control.waited(1, None)
    assert control.choose(1) > 0


def test_one_very_late_answer_does_not_end_drafting():
    control = SpeculationControl(7)
    Machine(plain=1.0, row=0.02, wait=0.2, right=0.85).run(control, 1, 300)
    control.waited(1, 1000.0)
    assert sum(control.choose(1) > 0 for _ in range(10)) >= 9


def test_a_pause_is_bounded_however_much_the_last_probe_cost():
    control = warmed()
    for _ in range(100):
        control.choose(1)
        control.waited(1, 1e9)
    rested = 0
    while control.choose(1) == 0:
        rested += 1
        assert rested <= LONGEST_DEBT + 1  # the choice that begins it is a plain step, too
    assert rested > FIRST_PAUSE


def test_a_new_drafter_is_not_judged_by_the_waits_for_the_old_one_and_is_probed_as_long_as_its_batch_needs():
    control = warmed(4)
    for _ in range(100):
        control.waited(4, 50.0)
    control.renew()
    for _ in range(PROBE_ROWS // 4):
        assert control.choose(4) == 7
        control.verified(7, 1)
        control.waited(4, 0.1)
    assert control.choose(4) == 1  # the probe has ended, and one draft is worth its wait
