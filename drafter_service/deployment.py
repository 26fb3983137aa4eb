"""The drafter as a Serve deployment: a thin asyncio front and one model process beside it.

Verifiers talk to the model process's link port directly. When that process dies or stops answering, the front ends
itself and Serve replaces both; verifiers notice by their own heartbeats, decode plainly and link to whoever is listed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve

from cluster.placement.directory import stay_registered
from cluster.placement.gang import Gang
from cluster.placement.lifeline import Lifeline
from cluster.placement.logs import configure_logs
from cluster.placement.membership import DRAFTER, Member
from cluster.placement.process import Main
from drafter_service.config import DrafterSettings

log = logging.getLogger(__name__)

DRAFTER_MAIN = "drafter_service.server:serve"


@serve.deployment(name="Drafter", health_check_period_s=2, health_check_timeout_s=10, graceful_shutdown_timeout_s=5)
class Drafter:
    """settings: of this replica. resources: Ray resources of the model process's bundle.

    directory: handle of the Directory. start_timeout_s: from process start to a loaded model.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it: starting takes seconds
        self, settings: DrafterSettings, resources: dict[str, float], directory: Any, start_timeout_s: float
    ) -> None:
        configure_logs()
        self.id = serve.get_replica_context().replica_id.unique_id
        self._gang = Gang(
            "DrafterModel", self.id, [resources], preload=(DRAFTER_MAIN.partition(":")[0],), threads=settings.threads
        )
        try:
            async with asyncio.timeout(start_timeout_s):
                self._address = await self._start(settings, start_timeout_s)
        except BaseException:
            self._gang.kill()
            raise
        log.info("drafter %s serves at %s", self.id, self._address)
        self._lifeline = Lifeline(self.id, self._gang, directory)
        self._lifeline.start(stay_registered(directory, lambda: Member(DRAFTER, self.id, self._address)))

    async def check_health(self) -> None:
        self._lifeline.raise_if_sick()

    def __del__(self) -> None:
        if hasattr(self, "_lifeline"):
            self._lifeline.stop()

    async def _start(self, settings: DrafterSettings, timeout_s: float) -> str:
        host, _ = await self._gang.rendezvous(timeout_s)
        return (
            await self._gang.start(
                lambda _: Main(DRAFTER_MAIN, (settings, host, 0), {"drafter_id": self.id}), timeout_s
            )
        )[0]
