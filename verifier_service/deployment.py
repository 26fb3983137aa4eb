"""The verifier as a Serve deployment: one replica = one target copy = one gang of rank processes.

The replica itself is a thin asyncio front: it starts the ranks, tells the directory where the engine listens, tells the
engine which drafters it may use, and ends itself when any rank does, so that Serve replaces the whole gang. Requests
do not pass through it: routers talk to the engine port of rank 0.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from ray import serve

from cluster.api.engine_client import EngineClient
from cluster.contracts import SetDrafters, Status
from cluster.errors import EngineDiedError
from cluster.pairing.policy import preference
from cluster.placement.directory import follow, stay_registered
from cluster.placement.gang import Gang
from cluster.placement.lifeline import Lifeline
from cluster.placement.logs import configure_logs
from cluster.placement.membership import DRAFTER, VERIFIER, Member, View
from cluster.placement.process import Main
from verifier_service.config import VerifierSettings
from verifier_service.drain import drained
from verifier_service.health import sickness
from verifier_service.live_settings import live_settings

log = logging.getLogger(__name__)

ANSWER_S = 5.0
RANK_MAIN = "verifier_service.rank:run_rank"


@serve.deployment(name="Verifier", health_check_period_s=2, health_check_timeout_s=10)
class Verifier:
    """settings: of this replica. rank_resources: Ray resources of each rank's bundle.

    make_link: builds rank 0's end of the link; chosen by the composition root, since it may hold a drafter.
    directory: handle of the Directory. start_timeout_s: from process start to a loaded engine. max_step_s: see health.
    drain_s: for requests under way when Serve asks the replica to stop; what is left then resumes on another engine.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it: starting takes many seconds
        self,
        settings: VerifierSettings,
        rank_resources: dict[str, float],
        make_link: Callable[..., Any],
        directory: Any,
        start_timeout_s: float,
        max_step_s: float,
        drain_s: float,
    ) -> None:
        configure_logs()
        self.id = serve.get_replica_context().replica_id.unique_id
        self._settings, self._max_step_s, self._drain_s = settings, max_step_s, drain_s
        self._status: Status | None = None
        self._drafters: tuple[str, ...] = ()
        self._gang = Gang(
            "VerifierRank",
            self.id,
            [rank_resources] * settings.tensor_parallel_size,
            preload=(RANK_MAIN.partition(":")[0],),
            threads=settings.threads_per_rank,
        )
        try:
            async with asyncio.timeout(start_timeout_s):
                self._address = await self._start(make_link, start_timeout_s)
                self._engine = await EngineClient.connect(self._address, ANSWER_S, settings.link.access)
                self._status = await self._engine.probe(ANSWER_S)
        except BaseException:
            self._gang.kill()
            raise
        log.info("verifier %s serves at %s with %d ranks", self.id, self._address, settings.tensor_parallel_size)
        self._lifeline = Lifeline(self.id, self._gang, directory, self._check)
        self._lifeline.start(follow(directory, self._pair), stay_registered(directory, self._member))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's user_config: see live_settings. Takes effect at the next step. Raises ValueError."""
        self._engine.send(live_settings(user_config))

    async def check_health(self) -> None:
        self._lifeline.raise_if_sick()

    async def __del__(self) -> None:
        """Serve awaits it. New requests go elsewhere, those under way have `drain_s`, then the ranks end."""
        if hasattr(self, "_lifeline"):
            await self._lifeline.withdraw()
            await drained(self._engine, self._drain_s)
            self._lifeline.stop()

    async def _start(self, make_link: Callable[..., Any], timeout_s: float) -> str:
        host, port = await self._gang.rendezvous(timeout_s)

        def main(rank: int) -> Main:
            keywords = {"engine_id": self.id, "host": host, "make_link": make_link if rank == 0 else None}
            return Main(RANK_MAIN, (self._settings, rank, f"{host}:{port}"), keywords)

        return (await self._gang.start(main, timeout_s))[0]

    async def _check(self) -> None:
        self._status = await self._engine.probe(ANSWER_S)
        if reason := sickness(self._status, self._max_step_s):
            raise EngineDiedError(reason)

    async def _pair(self, view: View) -> None:
        drafters = {member.id: member.address for member in view.of(DRAFTER)}
        verifiers = {member.id: member.info.get("drafter", "") for member in view.of(VERIFIER)}
        verifiers[self.id] = self._linked()
        addresses = tuple(drafters[d] for d in preference(self.id, verifiers, drafters, verifiers))
        if addresses != self._drafters:
            self._drafters = addresses
            self._engine.send(SetDrafters(addresses))

    def _member(self) -> Member:
        return Member(VERIFIER, self.id, self._address, {"drafter": self._linked()})

    def _linked(self) -> str:
        return self._status.drafter_id if self._status is not None and self._status.linked else ""
