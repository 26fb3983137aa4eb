"""Which seconds a deploy file's steps and drafts are priced by: its tables, if it has any, else its GPUs' roofline."""

from __future__ import annotations

from modeling.footprint import routed_experts
from paceline.plan.reading import Draft, Inputs
from paceline.plan.times import (
    DraftTimes,
    EstimatedDrafter,
    EstimatedTarget,
    MeasuredDrafter,
    MeasuredTarget,
    TargetTimes,
)
from paceline.plan.timing import TargetCost


def target_times(inputs: Inputs) -> TargetTimes | None:
    """None where there is no table and the GPU type is not known."""
    config, size = inputs.target.config, inputs.application.verifier.tensor_parallel_size
    cost = TargetCost(
        parts=inputs.target.parts(size),
        cache=inputs.target.cache(size),
        experts=routed_experts(config),
        layers=config.layers,
        hidden=config.hidden,
        itemsize=inputs.target.itemsize,
        size=size,
    )
    if inputs.table is not None:
        return MeasuredTarget(inputs.table, config.layers, cost, inputs.gpu)
    return None if inputs.gpu is None else EstimatedTarget(cost, inputs.gpu)


def draft_times(draft: Draft) -> DraftTimes | None:
    """None where there is no table and the GPU type is not known."""
    if draft.table is not None:
        return MeasuredDrafter(draft.table)
    return None if draft.gpu is None else EstimatedDrafter(draft.model, draft.gpu)
