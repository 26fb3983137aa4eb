"""What an engine has done so far, in numbers: the counters of its Status. Plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from verifier_service.plan import StepPlan
from verifier_service.sequence import Progress


def gap_share(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Between two accounts of an engine: the share of its steps' time in which the device had nothing to do."""
    seconds, gap = (after.get(name, 0.0) - before.get(name, 0.0) for name in ("step_seconds", "gap_seconds"))
    return gap / seconds if seconds > 0 else 0.0


class Tally:
    """Totals since the start; written by the engine's thread, read by any. Seconds are wall clock.

    step_seconds = forward_seconds (tokens taken included) + draft_seconds (waiting for drafts) + host_seconds, where
    nothing runs ahead. gap_seconds: between the end of a step's tokens and the beginning of the next forward, and
    between a forward and its late tokens; the device's own where it has a clock. steps_ahead: launched before the step
    before was read; rows_in_vain: of those, verified for requests that the step before had ended. Heartbeat steps are
    not counted.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._verify_rows = self._prefill_tokens = 0
        self._output = self._drafted = self._accepted = 0
        self._ahead = self._in_vain = 0
        self._step_s = self._forward_s = self._wait_s = self._gap_s = 0.0
        self._finished = {"stop": 0, "length": 0, "abort": 0, "deadline": 0, "error": 0}

    def step(
        self,
        plan: StepPlan,
        progress: Sequence[Progress],
        step_s: float,
        forward_s: float,
        wait_s: float,
        gap_s: float,
    ) -> None:
        self._steps += 1
        self._verify_rows += len(plan.verify)
        self._prefill_tokens += sum(len(chunk.token_ids) for chunk in plan.prefill)
        self._step_s += step_s
        self._forward_s += forward_s
        self._wait_s += wait_s
        self._gap_s += gap_s
        self._ahead += plan.ahead
        self._in_vain += len(plan.verify) + len(plan.prefill) - len(progress)
        for p in progress:
            self._output += len(p.token_ids)
            self._drafted += p.drafted
            self._accepted += p.accepted
            if p.finish is not None:
                self._finished[p.finish] += 1

    def finished(self, why: str) -> None:
        self._finished[why] += 1

    def counters(self) -> dict[str, float]:
        return {
            "steps": float(self._steps),
            "verify_rows": float(self._verify_rows),
            "prefill_tokens": float(self._prefill_tokens),
            "output_tokens": float(self._output),
            "drafted_tokens": float(self._drafted),
            "accepted_tokens": float(self._accepted),
            "step_seconds": self._step_s,
            "forward_seconds": self._forward_s,
            "draft_seconds": self._wait_s,
            "gap_seconds": self._gap_s,
            "steps_ahead": float(self._ahead),
            "rows_in_vain": float(self._in_vain),
            "host_seconds": self._step_s - self._forward_s - self._wait_s,
            **{f"finished_{why}": float(count) for why, count in self._finished.items()},
        }
