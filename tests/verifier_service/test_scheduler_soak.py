"""The scheduler under thousands of random events: nothing leaks, nothing is written twice, and a hit equals a miss."""

from __future__ import annotations

import random

import pytest

from cluster.contracts import EngineRequest
from tests.verifier_service.soak import Soak
from verifier_service.scheduler import Scheduler, SchedulerLimits

KINDS = [None, 0, 1, 2, 6, 40]  # checkpoints; None: a target without recurrent state


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("checkpoints", KINDS)
def test_random_events_leak_no_block_slot_checkpoint_or_feature_page_and_a_hit_equals_a_miss(checkpoints, ahead):
    soak = Soak(7, checkpoints, ahead=ahead)
    soak.run(700)
    soak.drain()
    cache = soak.scheduler.cache
    assert (soak.counts["ahead"] > soak.counts["steps"] // 4) == ahead
    assert soak.counts["stopped"] > 0
    assert soak.scheduler.preemptions > 0
    assert (cache.hit_tokens > 0) == (checkpoints != 0)
    assert (soak.counts["restored"] > 0) == bool(checkpoints)
    assert cache.pool.evictions > 0 or checkpoints == 0


def test_a_burst_that_wants_more_checkpoints_than_there_are_plans_no_empty_chunk():
    """A prompt's second place for a checkpoint must not outlive the chunk that went past it."""
    rng = random.Random(3)
    scheduler = Scheduler(SchedulerLimits(64, 4096, 16, 2048, 256, checkpoints=4))
    openings = [[rng.randrange(999) for _ in range(96)] for _ in range(40)]
    count = saved = 0
    for _ in range(250):
        while len(scheduler) < 120:
            count += 1
            own = [rng.randrange(999) for _ in range(rng.randrange(4, 60))]
            prompt = (*rng.choice(openings)[: rng.choice([48, 64, 96])], *own)
            scheduler.add(EngineRequest(f"r{count}", prompt, 0, rng.randrange(1, 4)))
        plan = scheduler.plan()
        assert all(chunk.token_ids for chunk in plan.prefill)
        saved += sum(chunk.checkpoint >= 0 for chunk in plan.prefill)
        rows = sum(len(row.token_ids) for row in plan.verify) + sum(chunk.completes_prompt for chunk in plan.prefill)
        scheduler.commit([rng.randrange(999) for _ in range(rows)])
    assert saved


@pytest.mark.long
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("checkpoints", [None, 1, 6, 40])
def test_a_hundred_thousand_random_events(checkpoints, ahead, capsys):
    total = None
    for seed in range(20):
        soak = Soak(
            seed, checkpoints, slots=3 + seed % 6, blocks=21 + seed, step_tokens=(3, 16, 24, 100)[seed % 4], ahead=ahead
        )
        soak.run(5000)
        soak.drain()
        cache = soak.scheduler.cache
        soak.counts.update(
            preemptions=soak.scheduler.preemptions,
            hit_tokens=cache.hit_tokens,
            queried_tokens=cache.queried_tokens,
            evicted_blocks=cache.pool.evictions,
            evicted_checkpoints=cache.checkpoints.evictions,
        )
        total = soak.counts if total is None else total + soak.counts
    assert total is not None
    assert total["events"] == 100_000
    with capsys.disabled():
        print(f"\ncheckpoints {checkpoints}: " + ", ".join(f"{name} {count}" for name, count in sorted(total.items())))
