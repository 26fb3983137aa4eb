"""A step given to the device: its forward and the tokens taken from it, none of which the host waits for on a GPU.

The tokens stay on the device as well, for a step that is planned before the host has read them. The forward of such a
step needs no more than that; how its own tokens are taken may depend on what the host reads there (a penalty's counts,
a grammar's state). They are then taken late: after the step before has been read, while the forward is computed.
(SGLang's overlapped scheduler and vLLM's asynchronous one divide a step there for grammars: vllm-project/vllm#23233.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from cluster.contracts import SamplingParams
from modeling.copies import to_device
from verifier_service.flight import Planned, SampledRows, awaits, sampled_rows, told_rows
from verifier_service.grammar.decoding import ConstrainedDecoding
from verifier_service.grammar.masks import Masks
from verifier_service.marks import Mark, mark, seconds_between
from verifier_service.model.face import ForwardOutput, Runner
from verifier_service.plan import RowDraw, ShownRows, StepPlan
from verifier_service.sampling.draw import Draw
from verifier_service.sampling.race import signed
from verifier_service.sampling.sampler import decide
from verifier_service.sampling.shaping import draws_of
from verifier_service.sampling.step_logits import StepLogits, step_logits
from verifier_service.sampling.unread import Unread


@dataclass(slots=True, eq=False)
class Launched:
    """size: tokens of the plan. output: of its forward; logits: those among it. rows: that rank 0 takes tokens for, in
    the logits, save for those whose token is just the best one. began: monotonic seconds, before the step was planned.
    first: before the forward.

    Once its tokens are taken: samples, one for each row that has logits; last: when they are there; late: when the
    forward was done and when the taking began, of a step that had to wait for it.
    """

    plan: StepPlan
    size: int
    output: ForwardOutput
    logits: StepLogits | None
    rows: list[SampledRows]
    began: float
    first: Mark
    samples: Unread = field(init=False)
    last: Mark = field(init=False)
    late: tuple[Mark, Mark] | None = None

    def device_seconds(self, before: Mark | None) -> tuple[float, float]:
        """Of a step that is read: how long the device worked on it, and how long it waited for the host.

        before: when it was done with the step before; None: nobody waited then.
        """
        late = 0.0 if self.late is None else max(0.0, seconds_between(*self.late))
        waited = 0.0 if before is None else max(0.0, seconds_between(before, self.first))
        return seconds_between(self.first, self.last) - late, late + waited


class Launcher:
    """feeds: plans may be ahead."""

    def __init__(self, runner: Runner, constrained: ConstrainedDecoding, feeds: bool):
        self._runner, self._constrained, self._feeds = runner, constrained, feeds
        self._untaken: tuple[Launched, Mark] | None = None  # and when its forward is done

    def launch(self, plan: StepPlan, work: Planned, began: float) -> Launched:
        """work: the plan's rows with their requests. Its tokens may be left for `take_late` to take."""
        rows = sampled_rows(work) if plan.draws is None else _late_rows(plan, work)
        late = plan.ahead and bool(rows) and awaits(work)
        masks = None if late else self._constrained.start_masks(rows)
        first = mark(self._runner.shape.device)
        output = self._runner.forward(plan)
        logits = step_logits(plan, output.logits)
        step = Launched(plan, size_of(plan), output, logits, rows, began, first)
        if masks is not None:
            self._take(step, rows, masks)
        else:
            self._untaken = step, mark(self._runner.shape.device)
        return step

    def take_late(self) -> None:
        """What is left to be taken of the step launched last, now that the step before is read and has changed what it
        changes. Rows of requests that it has ended come to nothing."""
        if self._untaken is None:
            return
        (step, computed), self._untaken = self._untaken, None
        rows = [each for each in step.rows if each.sequence.slot >= 0]
        self._take(step, rows, self._constrained.start_masks(rows), computed)

    def _take(
        self, step: Launched, rows: list[SampledRows], masks: Callable[[], Masks], computed: Mark | None = None
    ) -> None:
        device, samples = self._runner.shape.device, step.output.tokens
        if samples is None or step.plan.late:
            assert step.logits is not None, "rank 0 gets the logits"
            draws = draws_of(rows, masks())
            if computed is not None:
                step.late = computed, mark(device)
            samples = _decided(step.plan, samples, step.logits.values, draws)
            if self._feeds:
                self._runner.feed(samples.clamp(min=0))
        step.last = mark(device)
        step.samples = Unread(samples)


def _decided(plan: StepPlan, taken: torch.Tensor | None, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """int64 [rows]: of all rows, or with those that are the ranks' own to take."""
    if taken is None:
        return decide(logits, draws)
    late = torch.tensor([row for each in plan.shown if each.late for row in each.rows])
    return taken.index_copy(0, to_device(late, taken.device), decide(logits[: len(late)], draws))


def _late_rows(plan: StepPlan, work: Planned) -> list[SampledRows]:
    """In the rows of the logits that are shown, which begin with these."""
    if not plan.late:
        return []
    found, at = [], 0
    for each in sampled_rows(work):
        if each.sequence.shaping is not None:
            found.append(replace(each, row=at))
            at += each.count
    return found


def with_draws(plan: StepPlan, work: Planned) -> StepPlan:
    """The plan with all that the ranks need to take its tokens, and with the rows whose logits rank 0 works on."""
    draws, late = [], []
    for each in sampled_rows(work):
        if each.sequence.shaping is not None:
            late.append(ShownRows(each.row, each.count, True))
            continue
        request = each.sequence.request
        wanted = request.sampling
        params = SamplingParams(wanted.temperature, wanted.top_p, wanted.top_k, min_p=wanted.min_p)
        draws.append(RowDraw(each.row, each.count, each.position, signed(request.seed), request.choice, params))
    told = [ShownRows(each.row, each.count, False) for each in told_rows(work) if each.sequence.shaping is None]
    return replace(plan, draws=tuple(draws), shown=(*late, *told))


def size_of(plan: StepPlan) -> int:
    """Tokens."""
    return sum(len(row.token_ids) for part in (plan.verify, plan.prefill) for row in part)
