"""How many KV blocks a device has room for, from what was measured on it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from modeling.device_memory import DeviceMemory


@dataclass(frozen=True)
class MemoryLimits:
    """share: of a device's memory that may be taken. step_tokens: of one step, at most. later: bytes of what this rank
    loads or opens after its model.
    """

    share: float = 0.9
    step_tokens: int = 2048
    later: int = 0


class NoRoomError(ValueError):
    """Not even one block fits: says by how much, and what to change."""


def kv_blocks(memory: DeviceMemory, block_bytes: int) -> int:
    """KV blocks that fit beside all else. Raises NoRoomError for none."""
    if memory.room < block_bytes:
        raise NoRoomError(
            f"kv_cache_tokens is 'auto', but memory_share {memory.share:g} of the device leaves no room for a KV cache "
            f"({memory.brief()}): raise tensor_parallel_size, or lower max_context, max_step_tokens, max_requests or "
            "checkpoint_bytes, or raise memory_share"
        )
    return memory.room // block_bytes
