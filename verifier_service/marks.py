"""When the device came by certain places of what it was given to do, so that its idle time can be told."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event


def mark(device: str) -> Mark:
    """Now, on a CPU; on a GPU, the moment when all that it has been given so far is done. Waits for nothing."""
    if not device.startswith("cuda"):
        return time.monotonic()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(earlier: Mark, later: Mark) -> float:
    """Both must have come to pass."""
    if isinstance(earlier, torch.cuda.Event):
        assert isinstance(later, torch.cuda.Event), "marks of one device"
        return earlier.elapsed_time(later) / 1000
    assert not isinstance(later, torch.cuda.Event), "marks of one device"
    return later - earlier
