"""Where a device's memory goes: what was found to take it, and what is left for a cache. No torch."""

from __future__ import annotations

from dataclasses import dataclass

GRAPH_BYTES = 8 << 20  # of a CUDA graph beside the memory that its launches work in: assumed, logged once captured
LINK_BYTES = 256 << 20  # of a communicator between a verifier and a drafter: assumed


@dataclass(frozen=True)
class DeviceMemory:
    """total: bytes of the device, of which `share` may be taken. parts: (what, bytes), of all but the cache."""

    total: int
    share: float
    parts: tuple[tuple[str, int], ...]

    @property
    def room(self) -> int:
        """Bytes left for a cache; below 0 if not even the rest fits."""
        return int(self.share * self.total) - sum(size for _, size in self.parts)

    def table(self, cache: str, cache_bytes: int) -> str:
        """For a log: a line a part, the cache's, and what is left of the device."""
        rows = [*self.parts, (cache, cache_bytes)]
        rows += [("left free", self.total - sum(size for _, size in rows)), ("device", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}} {size / 1e9:8.2f} GB {size / self.total:7.1%}" for name, size in rows)

    def brief(self) -> str:
        """For an error: the same in one line, without a cache."""
        return ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in (("device", self.total), *self.parts))
