"""How many drafters a verifier wants, by concurrency and GPU type. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paceline.plan.gpus import GPUS, Gpu
from paceline.plan.memory import DrafterModel, drafter_memory
from paceline.plan.times import DraftTimes, EstimatedDrafter, TargetTimes
from paceline.plan.timing import committed

WORTH = 0.9  # of the speed-up that many drafters would give: the fewest drafters that give so much are enough
BUSY = 0.7  # how much of a drafter's time verifiers may claim: beyond it they queue behind each other
MOST_DRAFTERS = 16


@dataclass(frozen=True)
class Workload:
    """What is assumed of the requests. rate: chance of each further draft; context: tokens before the current one."""

    rate: float
    context: int
    attended: int  # of the context, by a drafter: at most its window
    window: int  # context rows that a drafter keeps
    most_drafts: int


@dataclass(frozen=True)
class Step:
    """One verifier's step with `drafts` draft tokens a request, from `drafters` drafters. committed: tokens a request;
    speedup: tokens a second against plain decoding, which drafts = 0 is.
    """

    drafts: int
    drafters: int
    verify_s: float
    draft_s: float
    committed: float
    speedup: float

    @property
    def seconds(self) -> float:
        return self.verify_s + self.draft_s


@dataclass(frozen=True)
class Pool:
    """Drafters of one GPU type for one verifier, or the verifiers that a single one has time and memory for.

    step: with that many; None where plain decoding is faster with any number of them.
    """

    drafters: int
    verifiers: int
    step: Step | None

    def __str__(self) -> str:
        if self.step is None:
            return "plain"
        ratio = f"1 for {self.verifiers}" if self.verifiers > 1 else f"{self.drafters} each"
        return f"{ratio}, x{self.step.speedup:.1f}"


@dataclass(frozen=True)
class Load:
    """One verifier at `requests` running requests: plain decoding, with one drafter as the file has it, and pools of
    each GPU type.
    """

    requests: int
    plain_s: float
    step: Step
    pools: Mapping[str, Pool]

    @property
    def tokens_per_s(self) -> float:
        return self.requests * self.step.committed / self.step.seconds


@dataclass(frozen=True)
class Pair:
    """A target on its GPUs and a drafter, under a workload. own: times of the file's own drafter."""

    target: TargetTimes
    drafter: DrafterModel
    own: DraftTimes
    work: Workload

    def loads(self, concurrency: Iterable[int]) -> tuple[Load, ...]:
        """A row for each concurrency."""
        return tuple(self._load(requests) for requests in concurrency)

    def _load(self, requests: int) -> Load:
        verify = [
            self.target.step_s(requests, requests * (drafts + 1), self.work.context)
            for drafts in range(self.work.most_drafts + 1)
        ]
        own = self._best(self.own, 1, requests, verify)
        pools = {gpu.name: self._pool(gpu, requests, verify) for gpu in GPUS.values()}
        return Load(requests, verify[0], own, pools)

    def _best(self, times: DraftTimes, drafters: int, requests: int, verify: list[float]) -> Step:
        """The number of drafts that commits the most tokens a second. verify: seconds by number of drafts."""
        best = Step(0, 0, verify[0], 0.0, 1.0, 1.0)
        for drafts in range(1, len(verify)):
            seconds = times.draft_s(requests / drafters, drafts + 1, self.work.attended) + times.round_trip_s
            tokens = committed(self.work.rate, drafts)
            speedup = tokens * verify[0] / (verify[drafts] + seconds)
            if speedup > best.speedup:
                best = Step(drafts, drafters, verify[drafts], seconds, tokens, speedup)
        return best

    def _pool(self, gpu: Gpu, requests: int, verify: list[float]) -> Pool:
        capacity = drafter_memory(self.drafter, self.work.window, 0, gpu.memory_bytes).context_capacity or 0
        times = EstimatedDrafter(self.drafter, gpu)
        steps = [self._best(times, drafters, requests, verify) for drafters in range(1, MOST_DRAFTERS + 1)]
        most = max(step.speedup for step in steps)
        for step in steps:
            if step.drafts and step.speedup >= WORTH * most and requests <= step.drafters * capacity:
                if step.drafters > 1:
                    return Pool(step.drafters, 1, step)
                return Pool(1, max(1, min(int(BUSY * step.seconds / step.draft_s), capacity // requests)), step)
        return Pool(0, 0, None)
