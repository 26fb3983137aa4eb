"""Which padded sizes of a verify step have a CUDA graph, and which of them a step runs in. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SECTION = 2048  # context tokens that attention adds up in one piece where it cuts contexts at fixed multiples
SECTIONED_ROWS = 256  # that attend so at a time: partial sums of more would take gigabytes
CONTEXT_GROWTH = 8  # from one bound of the context to the next: a looser bound costs programs that have nothing to do


@dataclass(frozen=True, order=True)
class Bucket:
    """A step of up to `requests` verify rows with `rows` tokens in all, none of them past position `context` - 1."""

    rows: int
    requests: int
    context: int

    def holds(self, requests: int, rows: int, context: int) -> bool:
        return requests <= self.requests and rows <= self.rows and context <= self.context


def buckets(
    max_requests: int, longest_row: int, max_rows: int, max_context: int, section: int | None = None
) -> list[Bucket]:
    """Requests and tokens a request double from one bucket to the next, so that less than half of a step is padding
    in either.

    longest_row: tokens of one request (bonus and drafts). max_rows: of one step. section: multiples at which contexts
    are cut; they are bounded only there, for a graph launches programs for each section.
    """
    found = set()
    for requests in _doubling(1, max_requests):
        for each in _doubling(1, longest_row):
            rows = min(requests * each, max_rows)
            bounds = [max_context] if section is None else _growing(section, max_context, CONTEXT_GROWTH)
            found |= {Bucket(rows, requests, context) for context in bounds}
    return sorted(bucket for bucket in found if bucket.requests <= bucket.rows)


class Buckets:
    """Finds the smallest bucket that holds a step: the fewest rows, then requests, then context."""

    def __init__(self, buckets: Iterable[Bucket]):
        self.all = tuple(sorted(buckets))

    def smallest(self, requests: int, rows: int, context: int) -> Bucket | None:
        """None: no bucket is large enough."""
        return next((bucket for bucket in self.all if bucket.holds(requests, rows, context)), None)


def _doubling(first: int, last: int) -> list[int]:
    return _growing(first, last, 2)


def _growing(first: int, last: int, factor: int) -> list[int]:
    steps = []
    while first < last:
        steps.append(first)
        first *= factor
    return [*steps, last]
