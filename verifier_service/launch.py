"""A step given to the device: its forward and the tokens taken from it, none of which the host waits for on a GPU.

The tokens stay on the device as well, for a step that is planned before the host has read them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cluster.contracts import SamplingParams
from verifier_service.flight import Planned, sampled_rows
from verifier_service.grammar.decoding import ConstrainedDecoding
from verifier_service.marks import Mark, mark
from verifier_service.model.face import Runner
from verifier_service.plan import RowDraw, StepPlan
from verifier_service.sampling.race import signed
from verifier_service.sampling.sampler import decide
from verifier_service.sampling.shaping import draws_of
from verifier_service.sampling.unread import Unread


@dataclass(frozen=True, slots=True)
class Launched:
    """size: tokens of the plan. logits, taps: as in ForwardOutput. samples: a token for each row of the logits. began:
    monotonic seconds, before the step was planned. first, last: before the forward, and when the tokens are taken.
    """

    plan: StepPlan
    size: int
    logits: torch.Tensor | None
    taps: torch.Tensor | None
    samples: Unread
    began: float
    first: Mark
    last: Mark


def launch(
    runner: Runner, constrained: ConstrainedDecoding, plan: StepPlan, work: Planned, began: float, feeds: bool
) -> Launched:
    """work: the plan's rows with their requests. feeds: the next plan may be ahead."""
    rows = sampled_rows(work)
    masks = constrained.start_masks(rows)
    first = mark(runner.shape.device)
    output = runner.forward(plan)
    samples = output.tokens
    if samples is None:
        assert output.logits is not None, "rank 0 gets the logits"
        samples = decide(output.logits, draws_of(rows, masks()))
        if feeds:
            runner.feed(samples.clamp(min=0))
    last = mark(runner.shape.device)
    return Launched(plan, size_of(plan), output.logits, output.taps, Unread(samples), began, first, last)


def with_draws(plan: StepPlan, work: Planned) -> StepPlan:
    """The plan with all that the ranks need to take its tokens; as it is if the host works on somebody's logits."""
    if any(sequence.needs_host for sequence, _ in work):
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
