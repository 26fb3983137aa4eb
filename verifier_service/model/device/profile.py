"""What the largest steps take of a device's memory, found by running them over a small KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from verifier_service.model.executor import Executor
from verifier_service.model.memory_room import DeviceMemory
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow


class Meter(Protocol):
    """A device's memory, in bytes."""

    def used(self) -> tuple[int, int]:
        """(taken by anybody, total), once what this process does not need has been given back."""

    def allocated(self) -> int:
        """By this process's tensors."""

    def peak(self) -> int:
        """The most of allocated() since the last call."""


class CudaMeter:
    """A Meter of the current CUDA device."""

    def used(self) -> tuple[int, int]:
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free, total

    def allocated(self) -> int:
        import torch

        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        import torch

        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


def measured_memory(
    make: Callable[[int], Executor],
    meter: Meter,
    *,
    slots: int,
    verify_rows: int,
    step_tokens: int,
    block_tokens: int,
    max_context: int,
) -> tuple[DeviceMemory, int]:
    """The device's memory as it will be taken, and the bytes of a KV block.

    make: an executor over so many blocks, without CUDA graphs. verify_rows: of a step, at most; step_tokens: likewise.
    Collective.
    """
    chunk, longest = min(step_tokens, max_context), -(-verify_rows // slots)
    blocks = -(-chunk // block_tokens) + slots * -(-longest // block_tokens)
    used, total = meter.used()
    before = meter.allocated()
    executor = make(blocks)
    static = meter.allocated() - before - executor.cache_bytes
    base = meter.allocated()
    meter.peak()
    for plan in _largest(slots, verify_rows, chunk, block_tokens):
        executor.execute(plan, (), None)
    step, block_bytes = meter.peak() - base, executor.cache_bytes // blocks
    del executor
    return DeviceMemory(total, used + static, step, verify_rows, chunk), block_bytes


def _largest(slots: int, verify_rows: int, chunk: int, block_tokens: int) -> list[StepPlan]:
    """A prompt of one chunk; then a verify of all slots, in blocks of their own."""
    own = -(-chunk // block_tokens)
    prefill = StepPlan(
        1,
        new_blocks=tuple((0, block) for block in range(own)),
        prefill=(PrefillChunk(0, 0, (0,) * chunk, completes_prompt=True),),
    )
    counts = [verify_rows // slots + (slot < verify_rows % slots) for slot in range(slots)]
    blocks: list[tuple[int, int]] = []
    for slot, count in enumerate(counts):
        for _ in range(-(-count // block_tokens)):
            blocks.append((slot, own + len(blocks)))
    rows = tuple(VerifyRow(slot, 0, (0,) * count) for slot, count in enumerate(counts))
    verify = StepPlan(2, released=(0,), new_blocks=tuple(blocks), verify=rows)
    return [prefill, verify]
