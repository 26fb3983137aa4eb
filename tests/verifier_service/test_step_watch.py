"""A stuck step is told from a slow one by what steps of its size have taken."""

import math
import time

from cluster.contracts import EngineInfo, Status
from tests.verifier_service.fake_runner import FakeRunner
from verifier_service.engine import Engine
from verifier_service.health import sickness
from verifier_service.scheduler import SchedulerLimits
from verifier_service.step_watch import FACTOR, LEAST_S, WARM_UP_STEPS, StepWatch


def warm(*steps: tuple[int, float]) -> StepWatch:
    watch = StepWatch()
    for _ in range(WARM_UP_STEPS):
        watch.ended(0, 0.001)
    for tokens, seconds in steps:
        watch.ended(tokens, seconds)
    return watch


def status(since_step: float, limit: float = float("inf"), running: int = 1) -> Status:
    return Status(0, 7, since_step, running, 0, 1, 1, False, "", 0, {}, step_limit_s=limit)


def test_nothing_is_stuck_during_warm_up():
    watch = StepWatch()
    for _ in range(WARM_UP_STEPS - 1):
        assert math.isinf(watch.ended(8, 0.001))
    assert watch.ended(8, 0.001) == LEAST_S


def test_the_limit_scales_with_the_steps_of_that_size():
    watch = warm((8, 0.01), (2048, 2.0))
    assert watch.limit(8) == LEAST_S
    assert watch.limit(2000) == FACTOR * 2.0
    assert watch.limit(100) == FACTOR * 2.0, "between two sizes the larger one counts"


def test_a_step_larger_than_all_before_has_no_limit_of_its_own():
    assert math.isinf(warm((8, 0.01)).limit(64))


def test_a_single_slow_step_is_forgotten_in_time():
    watch = warm((8, 10.0))
    for _ in range(2000):
        watch.ended(8, 0.01)
    assert watch.limit(8) == LEAST_S


def test_the_closer_of_both_limits_ends_an_engine_busy_or_idle():
    assert sickness(status(6.0, limit=5.0), 30.0) is not None
    assert sickness(status(6.0, limit=5.0, running=0), 30.0) is not None
    assert sickness(status(4.0, limit=5.0), 30.0) is None
    assert sickness(status(29.0), 30.0) is None
    assert "limit 30 s" in (sickness(status(31.0), 30.0) or "")


def test_an_idle_engine_comes_to_know_its_limit_by_its_heartbeats():
    limits = SchedulerLimits(slots=2, blocks=8, block_tokens=4, step_tokens=16, max_waiting=4)
    engine = Engine(FakeRunner(2, 8, 4), limits, EngineInfo("e", "f", 32, 64, 2, 1), heartbeat_s=0.001)
    engine.start()
    try:
        deadline = time.monotonic() + 20
        while math.isinf(engine.status().step_limit_s):
            assert time.monotonic() < deadline, "heartbeats never ended the warm-up"
            time.sleep(0.01)
        assert engine.status().step_limit_s == LEAST_S
    finally:
        engine.stop()
