"""What a drafter takes of a device's memory beside its contexts, found by running its largest steps over a few."""

from __future__ import annotations

from collections.abc import Callable

import torch

from drafter_service.attention import Block
from drafter_service.blocks import BlockDrafting
from drafter_service.context import ContextTable
from drafter_service.inbox import MAX_BYTES
from drafter_service.loading import LoadedDrafter
from drafter_service.pool import STAGED_ROWS
from drafter_service.sizing import StepBytes
from modeling.device_memory import GRAPH_BYTES, LINK_BYTES, DeviceMemory
from modeling.memory_meter import Meter

MANY_BLOCKS = 64  # a draft of more is as much larger as it has more blocks
Make = Callable[[int, int], BlockDrafting]  # (contexts, blocks of a draft at most), without CUDA graphs


@torch.inference_mode()
def measured_memory(
    loaded: LoadedDrafter, make: Make, meter: Meter, share: float, max_queue: int
) -> tuple[DeviceMemory, StepBytes]:
    """All but contexts and steps; and what a step takes. max_queue: blocks of one draft, at most."""
    model, window = loaded.model, loaded.window
    before = meter.held()
    slots = -(-STAGED_ROWS // window)
    drafter = make(slots, MANY_BLOCKS)
    pool = drafter.pool
    ready = meter.held()
    table = ContextTable(slots, window)
    features = torch.zeros(window, loaded.config.hidden, dtype=model.dtype, device=model.device)
    for slot in range(slots):
        placement = table.append(("", str(slot)), 0, window)
        assert placement is not None, "there are as many slots"
        pool.stage(placement, features)
    pool.flush()
    pool.copy(range(window), range(window), 0)
    smallest = meter.peak() - ready
    block = Block(0, window, window, loaded.config.block_size, stale=False)
    largest, count = 0, 1
    while count <= MANY_BLOCKS:
        drafter.draft([block] * count, [0] * count)
        largest = meter.peak() - ready
        smallest, count = max(smallest, largest), 2 * count
    graphs = drafter.graphs
    buffers = ready - before - pool.nbytes
    del drafter, pool, placement, features
    buffers += max(0, meter.held() - before)  # what libraries keep once they were used
    outside, total = meter.outside()
    parts = (
        ("weights and what is beside them", before),
        ("buffers", max(0, buffers)),
        ("driver, other processes", outside),
        ("features that wait", MAX_BYTES),
        ("links", LINK_BYTES),
        ("CUDA graphs", smallest + graphs * GRAPH_BYTES if graphs else 0),
    )
    return DeviceMemory(total, share, parts), StepBytes(smallest, -(-largest // MANY_BLOCKS), max_queue)
