"""Estimates of steps and drafts, against figures that are published or that the design relies on."""

from __future__ import annotations

import pytest

from modeling.footprint import RoutedExperts
from paceline.plan.gpus import GPUS
from paceline.plan.memory import DrafterModel
from paceline.plan.pool import Pair, Workload
from paceline.plan.times import EstimatedDrafter, EstimatedTarget
from paceline.plan.timing import DRAFT_S, TargetCost, acceptance_rate, committed, draft_s
from tests.paceline.plan.shipped import drafter_of, target_of

WORK = Workload(rate=acceptance_rate(4.0, 16), context=4096, attended=4096, window=4096, most_drafts=15)


def cost_of(name: str, size: int) -> TargetCost:
    target = target_of(name)
    return TargetCost(
        parts=target.parts(size),
        cache=target.cache(size),
        experts=RoutedExperts(512, 10),
        layers=target.config.layers,
        hidden=target.config.hidden,
        itemsize=2,
        size=size,
    )


@pytest.fixture(scope="module")
def flagship() -> TargetCost:
    return cost_of("qwen3.5-397b-a17b-fp8", 8)


@pytest.fixture(scope="module")
def drafter() -> DrafterModel:
    return drafter_of("qwen3.5-397b-a17b-dflash")


def test_one_stream_of_the_397b_decodes_as_fast_as_is_published():
    step = cost_of("qwen3.5-397b-a17b", 8).step_s(GPUS["B200"], 1, 1, 1024)
    assert 1 / step == pytest.approx(203, rel=0.05)


def test_a_draft_costs_what_the_design_counts_with(drafter):
    alone = {name: draft_s(drafter, GPUS[name], 1, 16, 0) - DRAFT_S for name in ("H200", "L40S")}
    assert alone["H200"] == pytest.approx(0.9e-3 / 0.75, rel=0.05)
    assert alone["L40S"] == pytest.approx(5e-3 / 0.75, rel=0.05)
    operations = (draft_s(drafter, GPUS["H200"], 256, 16, 0) - DRAFT_S) * GPUS["H200"].flops * 0.6
    assert operations == pytest.approx(16e12, rel=0.1)


def test_a_verify_of_a_mixture_costs_more_than_a_plain_step_even_alone(flagship):
    plain, verify = (flagship.step_s(GPUS["H200"], 1, rows, 4096) for rows in (1, 16))
    assert verify > 1.4 * plain


def test_the_rate_gives_back_the_acceptance_length():
    for length in (1.0, 2.5, 4.0, 8.0):
        assert committed(acceptance_rate(length, 8), 7) == pytest.approx(length)


@pytest.mark.parametrize("length", [0.5, 9.0])
def test_an_acceptance_length_beyond_the_block_is_refused(length):
    with pytest.raises(ValueError, match="not between 1 and the block size 8"):
        acceptance_rate(length, 8)


def _pair(target: TargetCost, drafter: DrafterModel, work: Workload, drafter_gpu: str) -> Pair:
    own = EstimatedDrafter(drafter, GPUS[drafter_gpu])
    return Pair(EstimatedTarget(target, GPUS["H200"]), drafter, own, work)


def test_plain_decoding_is_one_of_the_choices(flagship, drafter):
    hopeless = Workload(rate=0.01, context=4096, attended=4096, window=4096, most_drafts=15)
    (load,) = _pair(flagship, drafter, hopeless, "L40S").loads([64])
    assert (load.step.drafts, load.step.speedup) == (0, 1.0)
    assert {str(pool) for pool in load.pools.values()} == {"plain"}


def test_more_requests_want_more_drafters(flagship, drafter):
    few, many = _pair(flagship, drafter, WORK, "H200").loads([8, 128])
    assert few.pools["H200"].verifiers > 1
    assert many.pools["L40S"].drafters > many.pools["B200"].drafters
    assert many.pools["H200"].drafters >= few.pools["H200"].drafters


def test_one_drafter_serves_no_more_verifiers_than_its_memory_holds_contexts(flagship, drafter):
    wide = Workload(rate=WORK.rate, context=4096, attended=16, window=65536, most_drafts=15)
    (load,) = _pair(flagship, drafter, wide, "H200").loads([16])
    contexts = (GPUS["L40S"].memory_bytes - drafter.bytes - 2e9) // (65552 * (drafter.row_bytes + 8))
    assert load.pools["L40S"].verifiers <= contexts // 16


def test_every_row_gains_or_is_plain(flagship, drafter):
    for load in _pair(flagship, drafter, WORK, "L40S").loads([1, 4, 16, 64, 256]):
        assert load.step.speedup >= 1.0
        assert load.tokens_per_s >= load.requests / load.plain_s * 0.999
