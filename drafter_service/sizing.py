"""How many draft contexts a device's memory holds, from what was measured on it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.errors import ConfigError
from modeling.device_memory import DeviceMemory

POSITION_BYTES = 8
ON_CPU = 256  # contexts, where nothing is measured
MOST = 4096  # as many as one verifier may run requests: beyond it memory does better as it is


@dataclass(frozen=True)
class ContextSize:
    """window, block_size: tokens of context and of a block; row_bytes: keys and values of one token in all layers."""

    window: int
    block_size: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        """Of one draft context: its window and room for a block, with their positions."""
        return (self.window + self.block_size) * (self.row_bytes + POSITION_BYTES)


@dataclass(frozen=True)
class StepBytes:
    """What a drafter works in. smallest: its largest append, or draft of a few blocks; block: each of a draft of many
    blocks. Only most_blocks are drafted at once."""

    smallest: int
    block: int
    most_blocks: int

    def of(self, contexts: int) -> int:
        """Of the largest step with so many contexts."""
        return max(self.smallest, self.block * min(contexts, self.most_blocks))


def contexts_that_fit(room: int, context_bytes: int, step: StepBytes) -> int:
    """room: bytes for contexts and the step."""
    return max(
        0,
        min(
            (room - step.smallest) // context_bytes,
            max(room // (context_bytes + step.block), (room - step.of(step.most_blocks)) // context_bytes),
        ),
    )


def chosen_contexts(
    wanted: int | Literal["auto"], size: ContextSize, memory: DeviceMemory, step: StepBytes
) -> tuple[int, str]:
    """How many contexts to hold, and a table of the memory for the log. A number may take all of the device.

    memory: without contexts and step. Raises ConfigError for more than fit, or if not even one does.
    """
    room = memory.room if wanted == "auto" else memory.room + memory.total - int(memory.share * memory.total)
    fitting = contexts_that_fit(room, size.bytes, step)
    count = min(fitting, MOST) if wanted == "auto" else wanted
    if count > fitting or not count:
        cure = f"max_contexts to {fitting} or less, or a smaller window" if fitting else "a smaller window"
        raise ConfigError(
            f"drafter.max_contexts is {wanted!r}, but of contexts of {size.bytes / 1e6:.0f} MB (window {size.window}) "
            f"only {fitting} fit beside the rest ({memory.brief()}): set {cure}"
        )
    whole = DeviceMemory(memory.total, memory.share, (*memory.parts, ("largest step", step.of(count))))
    return count, whole.table(f"{count} draft contexts", count * size.bytes)
