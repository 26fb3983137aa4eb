"""A step given to the device: its forward and the tokens taken from it, none of which the host waits for on a GPU.

The tokens stay on the device as well, for a step that is planned before the host has read them. The forward of such a
step needs no more than that; how its own tokens are taken may depend on what the host reads there (a penalty's counts,
a grammar's state). They are then taken late: after the step before has been read, while the forward is computed.
(SGLang's overlapped scheduler and vLLM's asynchronous one divide a step there for grammars: vllm-project/vllm#23233.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.contracts import SamplingParams
from verifier_service.flight import Planned, SampledRows, awaits, sampled_rows
from verifier_service.grammar.decoding import ConstrainedDecoding
from verifier_service.grammar.masks import Masks
from verifier_service.marks import Mark, mark, seconds_between
from verifier_service.model.face import ForwardOutput, Runner
from verifier_service.plan import RowDraw, StepPlan
from verifier_service.sampling.race import signed
from verifier_service.sampling.sampler import decide
from verifier_service.sampling.shaping import draws_of
from verifier_service.sampling.unread import Unread


@dataclass(slots=True, eq=False)
class Launched:
    """size: tokens of the plan. output: of its forward. rows: whose token is not just the best one. began: monotonic
    seconds, before the step was planned. first: before the forward.

    Once its tokens are taken: samples, one for each row of the logits; last: when they are there; late: when the
    forward was done and when the taking began, of a step that had to wait for it.
    """

    plan: StepPlan
    size: int
    output: ForwardOutput
    rows: list[SampledRows]
    began: float
    first: Mark
    samples: Unread = field(init=False)
    last: Mark = field(init=False)
    late: tuple[Mark, Mark] | None = None

    @property
    def idle_seconds(self) -> float:
        """How long the device waited for the host before the tokens were taken; once it has come to that."""
        return 0.0 if self.late is None else max(0.0, seconds_between(*self.late))


class Launcher:
    """feeds: plans may be ahead."""

    def __init__(self, runner: Runner, constrained: ConstrainedDecoding, feeds: bool):
        self._runner, self._constrained, self._feeds = runner, constrained, feeds
        self._untaken: tuple[Launched, Mark] | None = None  # and when its forward is done

    def launch(self, plan: StepPlan, work: Planned, began: float) -> Launched:
        """work: the plan's rows with their requests. Its tokens may be left for `take_late` to take."""
        rows = sampled_rows(work)
        late = plan.ahead and bool(rows) and awaits(work)
        masks = None if late else self._constrained.start_masks(rows)
        first = mark(self._runner.shape.device)
        output = self._runner.forward(plan)
        step = Launched(plan, size_of(plan), output, rows, began, first)
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
        if samples is None:
            assert step.output.logits is not None, "rank 0 gets the logits"
            draws = draws_of(rows, masks())
            if computed is not None:
                step.late = computed, mark(device)
            samples = decide(step.output.logits, draws)
            if self._feeds:
                self._runner.feed(samples.clamp(min=0))
        step.last = mark(device)
        step.samples = Unread(samples)


def with_draws(plan: StepPlan, work: Planned) -> StepPlan:
    """The plan with all that the ranks need to take its tokens; as it is if the host works on somebody's logits."""
    if any(sequence.shaping is not None or sequence.logprobs is not None for sequence, _ in work):
        return plan
    draws = []
    for each in sampled_rows(work):
        request = each.sequence.request
        wanted = request.sampling
        params = SamplingParams(wanted.temperature, wanted.top_p, wanted.top_k, min_p=wanted.min_p)
        draws.append(RowDraw(each.row, each.count, each.position, signed(request.seed), request.choice, params))
    return replace(plan, draws=tuple(draws))


def size_of(plan: StepPlan) -> int:
    """Tokens."""
    return sum(len(row.token_ids) for part in (plan.verify, plan.prefill) for row in part)
