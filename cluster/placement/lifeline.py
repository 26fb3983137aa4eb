"""What ties a replica to its gang: when the gang is of no use any more, the replica ends and Serve replaces both."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from cluster.errors import EngineDiedError, PacelineError
from cluster.placement.directory import leave
from cluster.placement.gang import Gang

log = logging.getLogger(__name__)

PERIOD_S = 2.0
ANSWER_S = 5.0


class Lifeline:
    """Watches a gang from its replica's event loop.

    member_id: of this replica, in logs and in the directory. check: more that has to hold, every two seconds; raises a
    PacelineError when it does not.
    """

    def __init__(self, member_id: str, gang: Gang, directory: Any, check: Callable[[], Awaitable[None]] | None = None):
        self._id, self._gang, self._directory, self._check = member_id, gang, directory, check
        self._sickness: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._others: list[asyncio.Task[None]] = []

    def start(self, *others: Coroutine[Any, Any, None]) -> None:
        """Begin watching; `others` run beside it for as long as the replica lives."""
        for coroutine in (self._watch_end(), self._watch_health(), *others):
            task = asyncio.create_task(coroutine)
            task.add_done_callback(self._finished)
            self._tasks.append(task)
        self._others = self._tasks[2:]

    def raise_if_sick(self) -> None:
        if self._sickness is not None:
            raise EngineDiedError(self._sickness)

    async def withdraw(self) -> None:
        """Out of the directory for good; what ran beside the watch ends. The gang is still watched."""
        for task in self._others:
            task.cancel()
        await asyncio.gather(*self._others, return_exceptions=True)
        await leave(self._directory, self._id)

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._gang.kill()

    async def _watch_end(self) -> None:
        await self._end(await self._gang.ended())

    async def _watch_health(self) -> None:
        while True:
            try:
                await self._gang.ping(ANSWER_S)
                if self._check is not None:
                    await self._check()
            except PacelineError as error:
                await self._end(str(error))
            await asyncio.sleep(PERIOD_S)

    async def _end(self, reason: str) -> None:
        """Ends the process rather than report illness: Serve replaces what has crashed at once, what is ill later."""
        self._sickness = f"{self._id}: {reason}"
        log.error("%s; this replica ends and Serve replaces it", self._sickness)
        self._gang.kill()
        await leave(self._directory, self._id)
        os._exit(1)

    def _finished(self, task: asyncio.Task[None]) -> None:
        """A replica whose watchers are gone must not live on looking healthy."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: a task of this replica failed", self._id, exc_info=error)
            self._sickness = self._sickness or f"{self._id}: {error!r}"
