"""A verifier in virtual time: the service's own scheduler, proposer and speculation control; only the model is missing.

The token of a position is its number, so that what is right needs no model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch

from cluster.contracts import EngineRequest
from cluster.errors import OverloadedError
from paceline.plan.times import HOST_REQUEST_S, HOST_S, TargetTimes
from paceline.simulate.virtual_time import Process, VirtualTime
from verifier_service.flight import Planned
from verifier_service.plan import StepPlan, VerifyRow
from verifier_service.proposers.face import Proposer
from verifier_service.scheduler import Scheduler, SchedulerLimits
from verifier_service.sequence import Progress

JITTER = 0.02  # of a step's seconds, to either side


@dataclass(slots=True)
class Tally:
    """Of one verifier, from `begin_s` on. token_s: seconds of each token after a request's first, those of one step
    sharing its time. first_s: from arrival to the first token. rows: verified; drafted_rows: those of them with drafts.
    """

    begin_s: float = 0.0
    tokens: int = 0
    steps: int = 0
    drafted_steps: int = 0
    rows: int = 0
    drafted_rows: int = 0
    drafts: int = 0
    accepted: int = 0
    refused: int = 0
    token_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Heard:
    """When a request came, and when its client last heard of it."""

    came: float
    last: float | None = None


class SimulatedVerifier:
    """Use: submit, at any time, while time runs. finished(): called for each request that has ended or was refused.

    runs_ahead: as engines do on a GPU; the host's work between two steps then shows only where there are drafts.
    """

    def __init__(
        self,
        time: VirtualTime,
        times: TargetTimes,
        limits: SchedulerLimits,
        make_proposer: Callable[[Process], Proposer],
        finished: Callable[[SimulatedVerifier], None],
        begin_s: float,
        seed: int,
        runs_ahead: bool,
    ):
        self._time, self._times, self._finished = time, times, finished
        self._scheduler = Scheduler(limits)
        self._host, self._ahead = times.host, runs_ahead
        self._rng = Random(seed)
        self._arrived: deque[EngineRequest] = deque()
        self._heard: dict[str, _Heard] = {}
        self.tally = Tally(begin_s)
        self.process = time.process(self._run)
        self._proposer = make_proposer(self.process)
        self._taps = torch.zeros(limits.step_tokens, 1) if self._proposer.tap_layers else None

    @property
    def counters(self) -> dict[str, float]:
        return {**self._scheduler.counters(), **self._proposer.state().counters}

    @property
    def held(self) -> int:
        """Requests that run or wait."""
        return len(self._scheduler) + len(self._arrived)

    def submit(self, request: EngineRequest) -> None:
        self._heard[request.request_id] = _Heard(self._time.now)
        self._arrived.append(request)
        self.process.notify()

    @torch.inference_mode()
    def _run(self, process: Process) -> None:
        while True:
            process.wait(lambda: self.held > 0)
            self._take_in()
            if len(self._scheduler):
                self._step(process)

    def _take_in(self) -> None:
        while self._arrived:
            request = self._arrived.popleft()
            try:
                self._scheduler.add(request)
            except OverloadedError:
                self.tally.refused += 1
                del self._heard[request.request_id]
                self._finished(self)

    def _step(self, process: Process) -> None:
        """As Engine._step orders it."""
        plan = self._scheduler.plan()
        work = self._scheduler.planned
        hidden = not self._host or (self._ahead and self._proposer.resting())
        seconds = self._model_s(plan) * self._rng.uniform(1 - JITTER, 1 + JITTER)
        if not hidden:
            seconds += HOST_S + HOST_REQUEST_S * len(plan.verify)
        process.sleep(seconds)
        progress = self._scheduler.commit(_samples(work))
        self._proposer.advance(progress, self._taps)
        self._emit(plan, progress)
        over = [each.sequence for each in progress if each.finish is not None]
        if over:
            self._proposer.forget(over)
        self._proposer.collect()
        self._proposer.learn(progress, bool(plan.prefill), seconds)

    def _model_s(self, plan: StepPlan) -> float:
        requests = len(plan.verify)
        tokens = sum(len(row.token_ids) for row in plan.verify)
        prefill = sum(len(chunk.token_ids) for chunk in plan.prefill)
        reach = sum(row.start for row in plan.verify) + sum(chunk.start for chunk in plan.prefill)
        return self._times.step_s(requests, tokens, reach / (requests + len(plan.prefill)), prefill)

    def _emit(self, plan: StepPlan, progress: list[Progress]) -> None:
        now, tally = self._time.now, self.tally
        counts = now >= tally.begin_s
        if counts and plan.verify:
            tally.steps += 1
            tally.drafted_steps += any(each.drafted for each in progress)
        for each in progress:
            if counts and each.drafted:
                tally.drafted_rows += 1
                tally.drafts += each.drafted
                tally.accepted += each.accepted
            count = len(each.token_ids)
            if not count:
                continue
            heard = self._heard[each.sequence.request.request_id]
            if counts:
                tally.tokens += count
                if heard.last is None:
                    tally.first_s.append(now - heard.came)
                else:
                    tally.rows += 1
                    tally.token_s += [(now - heard.last) / count] * count
            heard.last = now
            if each.finish is not None:
                del self._heard[each.sequence.request.request_id]
                self._finished(self)


def _samples(work: Planned) -> list[int]:
    """The target's own token for each row of a step's logits."""
    samples: list[int] = []
    for _, item in work:
        end = item.start + len(item.token_ids)
        if isinstance(item, VerifyRow):
            samples += range(item.start + 1, end + 1)
        elif item.completes_prompt:
            samples.append(end)
    return samples
