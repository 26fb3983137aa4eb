"""The ingress: HTTP, tokenizing and balancing in front of every verifier that the directory lists."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from cluster.api.app import create_app
from cluster.api.router import RouterCore
from cluster.api.settings import RouterSettings
from cluster.placement.directory import follow
from cluster.placement.logs import configure_logs
from cluster.placement.membership import VERIFIER, View
from cluster.tls import Access

log = logging.getLogger(__name__)


@serve.deployment(name="Router", health_check_period_s=2, graceful_shutdown_timeout_s=10)
@serve.ingress()
class Router:
    """Serves from the start and says on /health what is missing; it waits for no other deployment.

    target: checkpoint directory, read for its tokenizer. access: to the engine ports. directory: handle of the
    Directory. services: handles of the other deployments, which become part of the application by being named here.
    """

    def __init__(
        self,
        model_name: str,
        target: str,
        settings: RouterSettings,
        access: Access,
        directory: Any,
        services: dict[str, Any],
    ) -> None:
        configure_logs()
        self._core = RouterCore.load(model_name, target, settings, access)
        self._following = asyncio.get_running_loop().create_task(follow(directory, self._use))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self._core)

    async def check_health(self) -> None:
        if self._following.done():
            raise RuntimeError("the router no longer follows the directory") from self._following.exception()

    def __del__(self) -> None:
        if hasattr(self, "_following"):
            self._following.cancel()

    async def _use(self, view: View) -> None:
        self._core.set_engines([member.address for member in view.of(VERIFIER)])
