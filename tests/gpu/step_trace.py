"""How much of a run of steps the device spends between kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def gap_share(run: Callable[[], Any], device: str) -> float | None:
    """Of the time from the first kernel to the last, the share in which none ran; None without a GPU."""
    if device != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return idle_share(spans)


def idle_share(spans: Iterable[tuple[float, float]]) -> float | None:
    """Of (begin, end) intervals that may overlap; None without any."""
    ordered = sorted(spans)
    if not ordered:
        return None
    busy, reached = 0.0, ordered[0][0]
    for begin, end in ordered:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    whole = reached - ordered[0][0]
    return 1 - busy / whole if whole else 0.0
