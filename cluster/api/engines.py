"""The engines that a router knows: connected, probed, and one picked for each prompt."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

from cluster.api.balance import Load, choose
from cluster.api.engine_client import EngineClient
from cluster.api.engine_metrics import EngineCounts
from cluster.api.settings import RouterSettings
from cluster.errors import EngineDiedError, SecretError
from cluster.tls import OPEN, Access

log = logging.getLogger(__name__)

FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
DENIED_RETRY_S = 30.0  # a person has to act first


@dataclass(frozen=True)
class EngineHealth:
    """Of one address. problem: why no tokens can be had from it now, or None.

    drafting_failures: how often drafting failed in it and was built afresh. counts: what it and its drafter count.
    """

    address: str
    engine_id: str
    problem: str | None
    running: int = 0
    waiting: int = 0
    linked: bool = False
    drafting_failures: int = 0
    counts: EngineCounts | None = None


class Engines:
    """Keeps a connection to each address that it was told, and reconnects what breaks. Lives on one event loop.

    access: to the engine ports.
    """

    def __init__(self, settings: RouterSettings, access: Access = OPEN):
        self._settings = settings
        self._access = access
        self._known: dict[str, Engine] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._max_context: int | None = None
        self._vocabulary: int | None = None

    @property
    def max_context(self) -> int | None:
        """Tokens that fit any engine seen last; None before the first has introduced itself."""
        self._see()
        return self._max_context

    @property
    def vocabulary(self) -> int | None:
        self._see()
        return self._vocabulary

    def set(self, addresses: Collection[str]) -> None:
        """Replaces the earlier list. An engine that is no longer named finishes what it holds, and gets no more."""
        for address in set(self._known) - set(addresses):
            task = asyncio.create_task(self._known.pop(address).leave())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        for address in dict.fromkeys(addresses):
            if address not in self._known:
                self._known[address] = Engine(address, self._settings, self._access)

    def pick(self, key: bytes, without: Collection[str] = ()) -> EngineClient:
        """The engine for a prompt of this key. `without`: engine_ids that it has failed on. Raises EngineDiedError."""
        able = [client for client in self._clients() if client.info.engine_id not in without]
        if not able:
            raise EngineDiedError(f"no engine can take the request: {self._why()}")
        # One that is connected but unwell is better than none: it may only be slow.
        well = {engine.address for engine in self.health() if engine.problem is None}
        candidates = [client for client in able if client.address in well] or able
        clients = {client.info.engine_id: client for client in candidates}
        return clients[choose([_load(client) for client in candidates], key)]

    def health(self) -> list[EngineHealth]:
        return [engine.health() for engine in self._known.values()]

    async def close(self) -> None:
        """Ends all connections; requests under way end with EngineDiedError."""
        engines = list(self._known.values())
        self._known.clear()
        for task in list(self._leaving):
            task.cancel()
        await asyncio.gather(*[engine.stop() for engine in engines])
        await asyncio.gather(*self._leaving, return_exceptions=True)

    def _clients(self) -> list[EngineClient]:
        return [engine.client for engine in self._known.values() if engine.client is not None and engine.client.alive]

    def _see(self) -> None:
        if clients := self._clients():
            self._max_context = min(client.info.max_context for client in clients)
            self._vocabulary = min(client.info.vocabulary for client in clients)

    def _why(self) -> str:
        problems = [health.problem for health in self.health() if health.problem]
        return "; ".join(problems) or ("all of them were tried" if self._known else "none has registered yet")


class Engine:
    """One address: a task that connects, probes and reconnects. `client` is None while there is no connection."""

    def __init__(self, address: str, settings: RouterSettings, access: Access):
        self.address = address
        self.client: EngineClient | None = None
        self._settings = settings
        self._access = access
        self._problem = "it is being connected"
        self._task = asyncio.create_task(self._run(), name=f"keeping {address}")

    def health(self) -> EngineHealth:
        client = self.client
        if client is None or not client.alive or client.status is None:
            engine_id, reason = (client.info.engine_id, client.reason) if client is not None else ("", None)
            return EngineHealth(self.address, engine_id, reason or self._problem)
        status = client.status
        problem: str | None = None
        age = time.monotonic() - client.status_at
        busy = status.running + status.waiting > 0
        if age > self._settings.health_window_s:
            problem = f"it has not answered a probe for {age:.1f} s"
        elif busy and status.seconds_since_step > min(self._settings.engine_silence_s, status.step_limit_s):
            problem = f"it is busy, but has finished no step for {status.seconds_since_step:.1f} s"
        return EngineHealth(
            self.address,
            client.info.engine_id,
            problem,
            status.running,
            status.waiting,
            status.linked,
            int(status.counters.get("drafting_failures", 0)),
            EngineCounts(client.info.engine_id, status.drafter_id if status.linked else "", status.counters),
        )

    async def leave(self) -> None:
        """Wait until nothing is under way, then stop."""
        try:
            while self.client is not None and self.client.alive and self.client.in_flight:
                await asyncio.sleep(self._settings.probe_interval_s)
        finally:
            await self.stop()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            try:
                self.client = await EngineClient.connect(self.address, self._settings.connect_timeout_s, self._access)
                log.info("engine %s is connected at %s", self.client.info.engine_id, self.address)
                retry_s = FIRST_RETRY_S
                await self._watch(self.client)
            except EngineDiedError as error:
                if self.client is not None:
                    log.warning("engine %s at %s: %s", self.client.info.engine_id, self.address, error)
                self._problem = str(error)
                if isinstance(error.__cause__, SecretError):
                    log.error("%s", error)
                    retry_s = DENIED_RETRY_S
            finally:
                if self.client is not None:
                    self.client.close(self._problem)
                    self.client = None
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _watch(self, client: EngineClient) -> None:
        """Probe until the engine is lost or silent: raises EngineDiedError."""
        settings = self._settings
        while True:
            try:
                await client.probe(settings.health_window_s)
            except EngineDiedError:
                silence = time.monotonic() - client.heard_at
                if not client.alive:
                    raise
                if silence > settings.engine_silence_s:
                    raise EngineDiedError(f"the engine was silent for {silence:.1f} s") from None
            await asyncio.sleep(settings.probe_interval_s)


def _load(client: EngineClient) -> Load:
    # Other routers' requests are known from the engine's last word, our own exactly.
    status = client.status
    known = status.running + status.waiting if status is not None else 0
    return Load(client.info.engine_id, max(known, client.in_flight), max(1, client.info.max_requests))
