"""A closed loop of clients: each sends its next request when its last one has ended."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from paceline.bench.http_client import Timing
from paceline.bench.percentiles import Percentiles, percentiles
from paceline.bench.prompts import Prompt

Send = Callable[[Prompt], Awaitable[Timing]]


@dataclass(frozen=True)
class Level:
    """One concurrency. Latencies in milliseconds, of requests without error; None if there was none.

    ttft: to the first text. itl: between chunks with text. per_token: a request's mean between tokens. total: a
    request's whole time. errors: kind -> count. tokens_counted_by_server: else chunks were counted.
    """

    concurrency: int
    requests: int
    seconds: float
    tokens: int
    tokens_per_s: float
    requests_per_s: float
    ttft: Percentiles | None
    itl: Percentiles | None
    per_token: Percentiles | None
    total: Percentiles | None
    errors: dict[str, int]
    tokens_counted_by_server: bool


async def measure(
    send: Send, prompts: Sequence[Prompt], concurrency: int, requests: int, advance: Callable[[int, str], None]
) -> Level:
    """`requests` requests by `concurrency` clients; prompts are taken in turn. advance(1, "") after each."""
    waiting = itertools.islice(itertools.cycle(prompts), requests)
    timings: list[Timing] = []

    async def client() -> None:
        for prompt in waiting:
            timings.append(await send(prompt))
            advance(1, f"concurrency {concurrency}")

    started = perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return summary(concurrency, perf_counter() - started, timings)


def summary(concurrency: int, seconds: float, timings: Sequence[Timing]) -> Level:
    good = [timing for timing in timings if timing.error is None]
    tokens = sum(timing.tokens for timing in good)
    return Level(
        concurrency=concurrency,
        requests=len(timings),
        seconds=seconds,
        tokens=tokens,
        tokens_per_s=tokens / seconds,
        requests_per_s=len(good) / seconds,
        ttft=_milliseconds([t.ttft for t in good if t.ttft is not None]),
        itl=_milliseconds([gap for t in good for gap in t.gaps]),
        per_token=_milliseconds([t.per_token for t in good if t.per_token is not None]),
        total=_milliseconds([t.seconds for t in good]),
        errors=dict(Counter(t.error for t in timings if t.error is not None)),
        tokens_counted_by_server=all(t.counted_by_server for t in good),
    )


def _milliseconds(seconds: list[float]) -> Percentiles | None:
    return percentiles([1000 * value for value in seconds])
