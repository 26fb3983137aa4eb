"""A gang's start, over processes that are played: no cluster."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest

from cluster.placement import gang as gangs
from cluster.placement.gang import Gang, GangError
from cluster.placement.process import Main


class Method:
    def __init__(self, call: Callable[..., Any]):
        self.remote = call


def never() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


class Played:
    """A process that loads for ever. pings: how many it answers before it is stopped; after: seconds to the first."""

    def __init__(self, pings: int, after: float = 0.0):
        self.left, self.after = pings, after
        self.run = self.ready = Method(lambda *_: never())
        self.ping = Method(self._ping)

    async def _ping(self) -> None:
        await asyncio.sleep(self.after)
        self.after = 0.0
        if not self.left:
            await never()
        self.left -= 1


def started(*processes: Any) -> Any:
    """What starting them comes to."""
    gang = Gang.__new__(Gang)
    gang._processes = list(processes)
    try:
        return asyncio.run(gang.start(lambda _: Main("unused"), timeout_s=60.0))
    finally:
        gc.collect()  # cancelled coroutines end here, and not within an import, which CPython 3.11 does not bear


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gangs, "START_SILENCE_S", 1.0)
    monkeypatch.setattr(gangs, "START_PING_S", 0.01)


def test_a_process_that_is_stopped_while_it_loads_is_not_waited_for():
    began = time.monotonic()
    with pytest.raises(GangError, match=r"rank 1 did not answer within 1 s"):
        started(Played(10**9), Played(3))
    assert time.monotonic() - began < 10


def test_a_process_that_answers_has_its_time_to_be_placed_and_to_load():
    process = Played(10**9, after=1.5)

    async def ready(_: float) -> str:
        while process.left > 10**9 - 5:
            await asyncio.sleep(0.01)
        return "here"

    process.ready = Method(ready)
    assert started(process) == ["here"]
