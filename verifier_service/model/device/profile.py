"""Where a device's memory will go, found by running the largest steps over a small KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from cluster.contracts import SamplingParams
from modeling.device_memory import GRAPH_BYTES, DeviceMemory
from modeling.memory_meter import Meter
from verifier_service.model.executor import Executor
from verifier_service.model.face import ForwardOutput
from verifier_service.model.largest_steps import LargestSteps
from verifier_service.model.memory_room import MemoryLimits
from verifier_service.sampling.draw import Draw
from verifier_service.sampling.edits import mask_only
from verifier_service.sampling.sampler import decide


class Profiled(Executor, Protocol):
    """An executor that can say what it takes. state_bytes: of recurrent states, and of what a verify keeps for their
    commit; saved_bytes: of their checkpoints.
    """

    state_bytes: int
    saved_bytes: int

    def rehearse(self) -> int:
        """Run what CUDA graphs would hold, launch by launch; how many graphs there would be."""


def measured_memory(
    make: Callable[[int], Profiled],
    meter: Meter,
    steps: LargestSteps,
    limits: MemoryLimits,
    *,
    weight_bytes: int,
    checkpoint_bytes: int,
    taps: Sequence[int],
) -> tuple[DeviceMemory, int]:
    """The device's memory as it will be taken, and the bytes of a KV block.

    make: an executor over so many blocks, without CUDA graphs. checkpoint_bytes: what may become of a few blocks'
    checkpoints. Collective.
    """
    before = meter.held()
    executor = make(steps.blocks)
    block_bytes = executor.cache_bytes // steps.blocks
    executor.execute(steps.tables(), (), None)
    ready = meter.held()
    output = None
    for plan in steps.plans():
        output = executor.execute(plan, taps, None)  # beside the one before: the engine reads a step that late
        _take_tokens(output)
    del output
    step = meter.peak() - ready
    graphs = executor.rehearse()
    graph_bytes = graphs * GRAPH_BYTES + meter.peak() - ready if graphs else 0
    states, saved = executor.state_bytes, executor.saved_bytes
    buffers = ready - weight_bytes - states - saved - executor.cache_bytes
    del executor
    buffers += max(0, meter.held() - before)  # what libraries keep once they were used
    outside, total = meter.outside()
    parts = (
        ("weights", weight_bytes),
        ("recurrent states", states),
        ("their checkpoints", checkpoint_bytes if saved else 0),
        ("buffers", max(0, buffers)),
        ("driver, communicators, other processes", outside),
        ("loaded later", limits.later),
        ("largest step", step),
        ("CUDA graphs", graph_bytes),
    )
    return DeviceMemory(total, limits.share, parts), block_bytes


def _take_tokens(output: ForwardOutput) -> None:
    """As for requests that are bound by a grammar and sampled among the most probable: nothing takes more memory."""
    logits = output.logits
    if logits is None or not len(logits):
        return
    allowed = torch.full((len(logits), -(-logits.shape[1] // 32)), -1, dtype=torch.int32)
    decide(logits, [Draw(0, len(logits), 1, 0, 0, SamplingParams(1.0, top_p=0.9, top_k=8), mask_only(allowed))])
