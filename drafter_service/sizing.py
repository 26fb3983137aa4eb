"""How many draft contexts a device's memory holds, told before any of it is taken."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cluster.errors import ConfigError

log = logging.getLogger(__name__)

RESERVED_BYTES = 10**9  # for graphs, workspaces and a large append's rows: assumed
POSITION_BYTES = 8


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


def check_contexts(wanted: int, size: ContextSize, free_bytes: int) -> None:
    """free_bytes: of the device, with the weights loaded. Raises ConfigError if `wanted` contexts do not fit."""
    fitting = max(0, free_bytes - RESERVED_BYTES) // size.bytes
    if wanted > fitting:
        cure = f"max_contexts to {fitting} or less, or a smaller window" if fitting else "a smaller window"
        raise ConfigError(
            f"drafter.max_contexts is {wanted}, but of contexts of {size.bytes / 1e6:.0f} MB (window {size.window}) "
            f"only {fitting} fit into the {free_bytes / 1e9:.1f} GB that the weights leave free: set {cure}"
        )
    log.info("%d draft contexts of %.0f MB; %d would fit", wanted, size.bytes / 1e6, fitting)
