"""The end of an engine that nobody new is sent to: its requests finish, as far as there is time for it."""

from __future__ import annotations

import asyncio
import logging
import time

from cluster.api.engine_client import EngineClient
from cluster.errors import EngineDiedError

log = logging.getLogger(__name__)

LOOK_S = 0.25


async def drained(engine: EngineClient, grace_s: float) -> bool:
    """Waits until the engine has been idle at two looks in a row, since routers hear of a departure a moment later.

    False if that takes longer than grace_s; True as well if the engine is gone.
    """
    until = time.monotonic() + grace_s
    idle = 0
    while True:
        try:
            status = await engine.probe(max(LOOK_S, until - time.monotonic()))
        except EngineDiedError as error:
            log.info("the engine did not live to be drained: %s", error)
            return True
        left = status.running + status.waiting
        idle = idle + 1 if left == 0 else 0
        if idle == 2:
            return True
        if time.monotonic() >= until:
            log.warning("%d requests are not finished after %g s; they go on elsewhere", left, grace_s)
            return False
        await asyncio.sleep(LOOK_S)
