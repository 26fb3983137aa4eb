"""The whole application on a Ray of its own, as integration tests use it. Every wait has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import ray
import yaml
from ray import serve

from cluster.api.engine_client import EngineClient
from cluster.contracts import Status
from cluster.placement.membership import VERIFIER, Member, View
from cluster.placement.secret import drawn_once
from cluster.tls import Access
from deploy.file import read_deploy_file
from deploy.session import app_state, deploy, ray_session

T = TypeVar("T")
START_S = 180.0


@dataclass(frozen=True)
class Served:
    """A running application. url without trailing slash; model: the name that clients give."""

    name: str
    url: str
    model: str

    def processes(self, role: str) -> dict[str, int]:
        """Pids of the model processes of a role ("VerifierRank", "DrafterModel") by name, dead ones left out."""
        pids = {}
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["name"].startswith(f"{role}:"):
                with contextlib.suppress(ValueError, ray.exceptions.RayError):
                    actor: Any = ray.get_actor(entry["name"], namespace=entry["namespace"])
                    pids[entry["name"]] = int(ray.get(actor.pid.remote(), timeout=2))
        return pids

    def members(self) -> tuple[Member, ...]:
        """Verifiers, as the directory lists them."""
        handle = serve.get_deployment_handle("Directory", self.name)
        view: View = handle.watch.remote("", 0.0).result(timeout_s=10)
        return view.of(VERIFIER)

    def verifiers(self) -> list[str]:
        """Addresses of engine ports."""
        return [member.address for member in self.members()]

    @property
    def secret(self) -> str:
        """Of the engine ports: the deploy file brings none."""
        return drawn_once(self.model)

    def status(self) -> Status:
        """Of the first verifier's engine, asked on its own port."""
        return asyncio.run(_status(self.verifiers()[0], self.secret))

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=10)


@contextlib.contextmanager
def served(arguments: dict[str, Any], directory: Path) -> Iterator[Served]:
    """Serve the application with these builder arguments on a free port; everything ends with the block."""
    port = free_port()
    path = directory / "served.yaml"
    application = {"name": "it", "route_prefix": "/", "import_path": "deploy.app:build", "args": arguments}
    http = {"host": "127.0.0.1", "port": port}
    path.write_text(yaml.safe_dump({"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}))
    file = read_deploy_file(path)
    with ray_session(None):
        deploy(file)
        app = Served("it", f"http://127.0.0.1:{port}", file.application.model_name)
        eventually(lambda: _ready(app), START_S, lambda: f"the application is {app_state('it')}")
        yield app


def eventually(check: Callable[[], T], timeout_s: float, otherwise: Callable[[], str]) -> T:
    """The first true value of `check`; network errors count as false. Fails with `otherwise()` past the deadline."""
    until = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.HTTPError, OSError, LookupError):
            if value := check():
                return value
        assert time.monotonic() < until, f"after {timeout_s:g} s: {otherwise()}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(app: Served) -> bool:
    state = app_state(app.name)
    assert state.status != "DEPLOY_FAILED", state
    return state.status == "RUNNING" and app.health().status_code == 200


async def _status(address: str, secret: str) -> Status:
    engine = await EngineClient.connect(address, 5.0, Access(secret))
    try:
        return await engine.probe(5.0)
    finally:
        engine.close()
