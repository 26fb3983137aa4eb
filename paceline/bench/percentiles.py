"""Percentiles of latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Percentiles:
    """In the unit of the samples."""

    p50: float
    p90: float
    p99: float
    mean: float
    count: int


def percentile(samples: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default. samples: at least one, in any order."""
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def percentiles(samples: Sequence[float]) -> Percentiles | None:
    """None without samples."""
    if not samples:
        return None
    p50, p90, p99 = (percentile(samples, p) for p in (50, 90, 99))
    return Percentiles(p50, p90, p99, sum(samples) / len(samples), len(samples))
