"""Seconds between and beyond measured points: piecewise linear in every coordinate, and never less for more work."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

Point = tuple[int, ...]
_Values = dict[tuple[int, ...], float]  # by the index on each axis


class Grid:
    """A function of as many coordinates as the points have. The smallest value of each axis has to be among the points
    together.

    Points that were not measured (too large for the memory, say) go on as those below them on the same axis do, by the
    last slope. Where a larger point came out faster than a smaller one, which is noise, it counts as no faster.
    Below an axis its first value holds. Beyond its last, the last slope goes on, the largest that any smaller value
    of the other axes has; beyond two axes both are added. An axis of one value says nothing: all along it is the same.
    """

    def __init__(self, points: Mapping[Point, float]):
        self.axes = [sorted(set(values)) for values in zip(*points)]
        self._values = _rising(self.axes, _filled(self.axes, points))
        self._slopes = [_last_slopes(self.axes, self._values, axis) for axis in range(len(self.axes))]

    def at(self, *where: float) -> float:
        """Seconds. where: one coordinate an axis."""
        seconds = _between(self.axes, self._values, where)
        for index, (axis, at) in enumerate(zip(self.axes, where)):
            if at > axis[-1] and len(axis) > 1:
                others = [*where[:index], *where[index + 1 :]]
                slope = _between([*self.axes[:index], *self.axes[index + 1 :]], self._slopes[index], others)
                seconds += (at - axis[-1]) * slope
        return seconds


def smallest(points: Mapping[Point, float]) -> Point:
    """What has to be among the points."""
    return tuple(min(values) for values in zip(*points))


def _filled(axes: Sequence[Sequence[int]], points: Mapping[Point, float]) -> _Values:
    values: _Values = {}
    for index in _indices(axes):
        measured = points.get(tuple(axis[i] for axis, i in zip(axes, index)))
        values[index] = measured if measured is not None else max(_going_on(axes, values, index))
    return values


def _going_on(axes: Sequence[Sequence[int]], values: _Values, index: tuple[int, ...]) -> Iterator[float]:
    """What each axis makes of a point, from those below it."""
    for number, (axis, i) in enumerate(zip(axes, index)):
        if i == 0:
            continue
        last = values[_moved(index, number, -1)]
        slope = 0.0
        if i > 1:
            slope = (last - values[_moved(index, number, -2)]) / (axis[i - 1] - axis[i - 2])
        yield last + max(0.0, slope) * (axis[i] - axis[i - 1])


def _rising(axes: Sequence[Sequence[int]], values: _Values) -> _Values:
    """Each value at least as large as all that lie below it."""
    raised: _Values = {}
    for index in _indices(axes):
        below = (raised[_moved(index, number, -1)] for number, i in enumerate(index) if i)
        raised[index] = max((values[index], *below))
    return raised


def _last_slopes(axes: Sequence[Sequence[int]], values: _Values, number: int) -> _Values:
    """Per unit of one axis, between its last two values; by the other axes' indices."""
    axis, others = axes[number], [*axes[:number], *axes[number + 1 :]]
    if len(axis) < 2:
        return {}
    slopes: _Values = {}
    for rest in _indices(others):
        high, low = ((*rest[:number], at, *rest[number:]) for at in (len(axis) - 1, len(axis) - 2))
        slopes[rest] = (values[high] - values[low]) / (axis[-1] - axis[-2])
    return _rising(others, slopes)


def _between(axes: Sequence[Sequence[int]], values: _Values, where: Sequence[float]) -> float:
    """Multilinear inside the axes; beyond them their ends hold."""
    sides = [_side(axis, at) for axis, at in zip(axes, where)]
    total = 0.0
    for corner in product(*sides):
        weight = 1.0
        for _, share in corner:
            weight *= share
        total += weight * values[tuple(i for i, _ in corner)]
    return total


def _side(axis: Sequence[int], at: float) -> tuple[tuple[int, float], ...]:
    """The neighbours on one axis, as indices with their weights."""
    high = bisect_right(axis, at)
    if high == 0:
        return ((0, 1.0),)
    low = high - 1
    if high == len(axis) or at == axis[low]:
        return ((low, 1.0),)
    share = (at - axis[low]) / (axis[high] - axis[low])
    return (low, 1.0 - share), (high, share)


def _indices(axes: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """In an order in which whatever lies below an index has come before it."""
    return product(*(range(len(axis)) for axis in axes))


def _moved(index: tuple[int, ...], number: int, by: int) -> tuple[int, ...]:
    return (*index[:number], index[number] + by, *index[number + 1 :])
