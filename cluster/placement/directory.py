"""The directory: a Serve deployment of one replica where services find each other, and its clients' side.

Soft state only: when the replica is replaced, members register again within a third of their time to live, and
watchers keep what they saw last.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve

from cluster.placement.membership import EMPTY_VIEW, Member, Membership, View

log = logging.getLogger(__name__)

TTL_S = 9.0
WATCH_S = 20.0
CALL_DEADLINE_S = 5.0
RETRY_S = 0.5


@serve.deployment(
    name="Directory",
    num_replicas=1,
    max_ongoing_requests=10_000,
    health_check_period_s=2,
    graceful_shutdown_timeout_s=1,  # watchers wait by design: there is nothing to drain
    graceful_shutdown_wait_loop_s=0.2,
)
class Directory:
    """Registrations and long-polled views."""

    def __init__(self) -> None:
        self._membership = Membership()
        self._change = asyncio.Event()

    async def register(self, member: Member, ttl_s: float) -> None:
        if self._membership.register(member, ttl_s, time.monotonic()):
            self._announce()

    async def unregister(self, member_id: str) -> None:
        if self._membership.unregister(member_id):
            self._announce()

    async def watch(self, known_version: str, timeout_s: float) -> View:
        """The view, as soon as its version is not `known_version`; at the latest after timeout_s."""
        until = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if self._membership.expire(now):
                self._announce()
            view = self._membership.view
            if view.version != known_version or now >= until:
                return view
            expiry = self._membership.next_expiry()
            await self._wait(min(until, expiry if expiry is not None else until) - now)

    async def _wait(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._change.wait(), max(seconds, 0.0))
        except TimeoutError:
            return

    def _announce(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()


async def stay_registered(directory: Any, member: Callable[[], Member], ttl_s: float = TTL_S) -> None:
    """Keep `member()` in the directory until cancelled. directory: handle of the Directory deployment."""
    while True:
        try:
            await asyncio.wait_for(_call(directory.register, member(), ttl_s), CALL_DEADLINE_S)
        except Exception as error:  # whatever Ray raises while the directory is being replaced
            log.debug("the directory did not take a registration: %s", error)
            await asyncio.sleep(RETRY_S)
        else:
            await asyncio.sleep(ttl_s / 3)


async def follow(directory: Any, use: Callable[[View], Awaitable[None]]) -> None:
    """Call `use` with each new view until cancelled. A directory that is away changes nothing."""
    version = EMPTY_VIEW.version
    while True:
        try:
            view = await asyncio.wait_for(_call(directory.watch, version, WATCH_S), WATCH_S + CALL_DEADLINE_S)
        except Exception as error:  # whatever Ray raises while the directory is being replaced
            log.debug("the directory cannot be watched: %s", error)
            await asyncio.sleep(RETRY_S)
            continue
        if view.version != version:
            version = view.version
            await use(view)


async def leave(directory: Any, member_id: str, timeout_s: float = 1.0) -> None:
    """Unregister, as far as that is possible within timeout_s; the time to live does the rest."""
    try:
        await asyncio.wait_for(_call(directory.unregister, member_id), timeout_s)
    except Exception as error:
        log.debug("the directory did not take a departure: %s", error)


async def _call(method: Any, *arguments: Any) -> Any:
    return await method.remote(*arguments)
