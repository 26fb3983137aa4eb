"""The simulator against the engine that it stands for: the same costs, once slept and once simulated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.contracts import Delta, EngineInfo, EngineRequest
from cluster.link.messages import DraftAnswer, DraftAsk
from paceline.bench.null_model import VOCABULARY, NullDrafts, NullFuser, NullLink, NullRunner
from paceline.simulate.run import simulate
from tests.paceline.simulate.worlds import BLOCK, LIMITS, LinearDrafter, LinearTarget, drafting, load
from verifier_service.engine import Engine
from verifier_service.features import FeatureStore
from verifier_service.plan import StepPlan
from verifier_service.proposers.linked import LinkProposer
from verifier_service.scheduler import SchedulerLimits

TARGET = LinearTarget(base=15e-3, token=5e-4)
DRAFTER = LinearDrafter(base=4e-3, row=1e-4, round_trip_s=0.0)
RIGHT, REQUESTS, OUTPUT = 3, 4, 160


class SleepingRunner(NullRunner):
    def forward(self, plan: StepPlan):
        tokens = sum(len(row.token_ids) for row in plan.verify)
        prefill = sum(len(chunk.token_ids) for chunk in plan.prefill)
        time.sleep(TARGET.step_s(len(plan.verify), tokens, 0, prefill))
        return super().forward(plan)


class SleepingLink(NullLink):
    """Answers some time after it was asked."""

    def ask(self, asks: Sequence[DraftAsk]) -> None:
        rows = sum(ask.rows + 1 for ask in asks)
        self._ready_at = time.monotonic() + DRAFTER.draft_s(len(asks), rows / len(asks), 0)

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        time.sleep(max(0.0, self._ready_at - time.monotonic()))
        return super().collect(asks, timeout_s)


def tokens_per_s(drafted: bool) -> float:
    """Of the real engine: all requests begin together and are equally long."""
    limits = SchedulerLimits(REQUESTS, LIMITS.blocks, LIMITS.block_tokens, 256, 8, prefix_cache=False)
    proposer = None
    if drafted:
        link = SleepingLink(NullDrafts(BLOCK, RIGHT))
        store = FeatureStore(1 << 22, LIMITS.block_tokens, 16)
        proposer = LinkProposer(
            link, NullFuser(BLOCK), store, verifier_id="v", max_draft_tokens=None, soft_deadline_s=0.25
        )
    info = EngineInfo("e", "", 4096, VOCABULARY, REQUESTS, BLOCK)
    engine = Engine(SleepingRunner(4096), limits, info, proposer=proposer)
    came: list[tuple[float, int]] = []

    def sink(deltas: list[Delta]) -> None:
        came.append((time.monotonic(), sum(len(delta.token_ids) for delta in deltas)))

    for index in range(REQUESTS):
        engine.submit(EngineRequest(f"r{index}", (index + 1, 2, 3), 0, OUTPUT), sink)
    engine.start()
    try:
        deadline = time.monotonic() + 60
        while sum(count for _, count in came) < REQUESTS * OUTPUT:
            assert time.monotonic() < deadline, "the engine is done"
            time.sleep(0.01)
    finally:
        engine.stop()
    return sum(count for _, count in came[1:]) / (came[-1][0] - came[0][0])


@pytest.mark.slow
def test_the_engine_decodes_as_fast_as_the_simulator_says():
    setup = replace(drafting(times=DRAFTER, adaptive=False), target=TARGET)
    stands = (1.0,) * RIGHT + (0.0,) * (BLOCK - 1 - RIGHT)
    same = load(REQUESTS, prompt=3, output=OUTPUT, seconds=20.0, warm_up_s=2.0, survival=stands)
    said, found = [], []
    for drafted in (False, True):
        said.append(simulate(setup, same, drafters=int(drafted)).tokens_per_s)
        found.append(tokens_per_s(drafted))
        assert found[-1] < 1.05 * said[-1]  # sleeps are never shorter
    assert found[1] / found[0] == pytest.approx(said[1] / said[0], rel=0.2)
