"""How many KV blocks a device has room for, from what was measured on it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryLimits:
    """share: of a device's memory that may be taken. step_tokens: of one step, at most."""

    share: float = 0.9
    step_tokens: int = 2048


class NoRoomError(ValueError):
    """Not even one block fits: says by how much, and what to change."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one rank's device. taken: by all that stays, whoever's it is, before the KV cache. step: what the
    largest step took on top while it ran. graph_rows of step_rows: the largest step in a CUDA graph, whose memory is
    its own, beside the allocator's.
    """

    total: int
    taken: int
    step: int
    graph_rows: int
    step_rows: int

    @property
    def graphs(self) -> int:
        return self.step * min(self.graph_rows, self.step_rows) // self.step_rows

    def blocks(self, share: float, block_bytes: int) -> int:
        """KV blocks that fit if all together may take `share` of the device. Raises NoRoomError for none."""
        room = int(share * self.total) - self.taken - self.step - self.graphs
        if room < block_bytes:
            parts = ", ".join(f"{name} {number / 1e9:.1f} GB" for name, number in self._parts())
            raise NoRoomError(
                f"kv_cache_tokens is 'auto', but memory_share {share:g} of the device leaves no room for a KV cache "
                f"({parts}): raise tensor_parallel_size, or lower max_step_tokens, max_requests or checkpoint_bytes, "
                "or raise memory_share"
            )
        return room // block_bytes

    def _parts(self) -> Sequence[tuple[str, int]]:
        return (
            ("device", self.total),
            ("weights, states and other processes", self.taken),
            ("a step", self.step),
            ("graphs", self.graphs),
        )
