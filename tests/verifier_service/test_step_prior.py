"""What a control makes of tables of steps before it has measured any, and how they give way."""

from __future__ import annotations

import pytest

from verifier_service.step_costs import StepCosts
from verifier_service.step_tables.prior import StepPrior
from verifier_service.step_tables.tables import DraftTable, VerifyTable

MOST = 7


def prior(scale: float = 1.0, drafts: bool = True) -> StepPrior:
    """Steps of 10 ms + 1 ms a request + 0.5 ms a token; drafts of 2 ms + 0.1 ms each."""
    verify = [
        {"requests": n, "rows": rows, "context": 8, "seconds": scale * (10e-3 + 1e-3 * n + 0.5e-3 * n * rows)}
        for n in (1, 64)
        for rows in (1, 8)
    ]
    draft = [{"contexts": n, "rows": 8, "window": 8, "seconds": scale * (2e-3 + 1e-4 * n)} for n in (1, 64)]
    steps = VerifyTable.model_validate({"format": 1, "shape": "t", "layers": 1, "verify": verify})
    waits = DraftTable.model_validate({"format": 1, "shape": "d", "block_size": 8, "draft": draft})
    return StepPrior(steps, waits if drafts else None, layers=1)


def test_costs_are_the_tables_before_anything_is_measured():
    costs = StepCosts(MOST, prior())
    assert costs.plain(8) == pytest.approx(10e-3 + 8 * 1.5e-3)
    assert costs.extra(8, 8 * 7) == pytest.approx(8 * 7 * 0.5e-3)
    assert costs.extra(8, 8 * 3) == pytest.approx(8 * 3 * 0.5e-3)
    assert costs.wait.at(16) == pytest.approx(2e-3 + 16e-4)
    assert costs.measured(8) == 0
    assert costs.wait.reach == 0.0


def test_what_is_measured_takes_the_place_of_a_table_from_another_machine():
    costs = StepCosts(MOST, prior(scale=0.2))
    for _ in range(40):
        costs.plain_step(8, 22e-3, prefilled=False)
        costs.drafted_step(8, 56, 50e-3)
        costs.wait.add(8, 2.8e-3)
    assert costs.plain(8) == pytest.approx(22e-3, rel=0.05)
    assert costs.extra(8, 56) == pytest.approx(28e-3, rel=0.05)
    assert costs.wait.at(8) == pytest.approx(2.8e-3, rel=0.05)


def test_steps_beside_prefill_are_no_faster_than_plain_ones():
    costs = StepCosts(MOST, prior(scale=2.0))
    costs.plain_step(8, 25e-3, prefilled=True)
    assert costs.plain(8) == pytest.approx(25e-3)


def test_steps_beside_prefill_are_not_taken_for_plain_ones_where_a_table_knows_better():
    costs = StepCosts(MOST, prior())
    costs.plain_step(8, 45e-3, prefilled=True)
    assert costs.plain(8) == pytest.approx(22e-3)


def test_the_first_plain_step_replaces_what_a_table_says_of_it():
    costs = StepCosts(MOST, prior(scale=10.0))
    costs.plain_step(8, 22e-3, prefilled=False)
    assert costs.plain(8) == pytest.approx(22e-3)


def test_another_drafter_is_expected_to_be_as_fast_as_the_table():
    costs = StepCosts(MOST, prior())
    for _ in range(20):
        costs.wait.add(8, 0.05)
    costs.forget_waits()
    assert costs.wait.at(8) == pytest.approx(2.8e-3)


def test_without_a_table_of_drafts_only_the_wait_is_unknown():
    costs = StepCosts(MOST, prior(drafts=False))
    assert costs.plain(1) == pytest.approx(11.5e-3)
    assert not costs.wait
