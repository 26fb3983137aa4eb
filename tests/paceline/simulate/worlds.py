"""A small world to simulate: a target and a drafter whose seconds are linear in what they do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paceline.plan.timing import acceptance_rate
from paceline.simulate.run import Drafting, Load, Setup
from verifier_service.scheduler import SchedulerLimits
from verifier_service.step_tables.prior import StepPrior
from verifier_service.step_tables.tables import DraftTable, VerifyTable

BLOCK = 8


@dataclass(frozen=True)
class LinearTarget:
    base: float = 6e-3
    request: float = 2e-5
    token: float = 4e-5
    prompt_token: float = 1e-5
    host: bool = False
    title: str = "linear"

    def step_s(self, requests: int, tokens: int, context: float, prefill: int = 0) -> float:
        return self.base + self.request * requests + self.token * tokens + self.prompt_token * prefill


@dataclass(frozen=True)
class LinearDrafter:
    base: float = 1e-3
    row: float = 5e-6
    round_trip_s: float = 2e-4
    title: str = "linear"

    def draft_s(self, contexts: float, rows: float, window: float) -> float:
        return self.base + self.row * contexts * rows


LIMITS = SchedulerLimits(64, 1 << 14, 16, 1024, 256, prefix_cache=False)
DRAFTING = Drafting(LinearDrafter(), BLOCK, 512, 64, 8192.0, 1 << 16, 0.25, 3.0)
SETUP = Setup(LinearTarget(), LIMITS, runs_ahead=True, drafting=DRAFTING)


def survival(tokens: float) -> tuple[float, ...]:
    rate = acceptance_rate(tokens, BLOCK)
    return tuple(rate**drafts for drafts in range(1, BLOCK))


def load(concurrency: int | None = 1, tokens: float = 4.0, seconds: float = 5.0, **changes) -> Load:
    made = Load(concurrency, None, prompt=32, output=100, survival=survival(tokens), seconds=seconds)
    return replace(made, **changes)


def drafting(**changes) -> Setup:
    return replace(SETUP, drafting=replace(DRAFTING, **changes))


def prior_of(target: LinearTarget, drafter: LinearDrafter, scale: float = 1.0) -> StepPrior:
    """What tables of these would say, times `scale`."""
    verify = [
        {"requests": n, "rows": rows, "context": 8, "seconds": scale * target.step_s(n, n * rows, 8)}
        for n in (1, 64)
        for rows in (1, BLOCK)
    ]
    draft = [
        {"contexts": n, "rows": rows, "window": 8, "seconds": scale * drafter.draft_s(n, rows, 8)}
        for n in (1, 64)
        for rows in (2, BLOCK)
    ]
    steps = VerifyTable.model_validate({"format": 1, "shape": "target", "layers": 1, "verify": verify})
    drafts = DraftTable.model_validate({"format": 1, "shape": "drafter", "block_size": BLOCK, "draft": draft})
    return StepPrior(steps, drafts, layers=1)
