"""A router behind uvicorn and fake engines, on an event loop of their own in a thread. Every wait has a deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import openai
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from cluster.api.app import create_app
from cluster.api.router import RouterCore
from cluster.api.settings import RouterSettings
from cluster.api.tokens import Tokens
from tests.cluster.api.fake_engine import FakeEngine

T = TypeVar("T")
WAIT_S = 10.0
MODEL = "tiny"


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WAIT_S)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()


class Served:
    """One running router. `url` has no trailing slash."""

    def __init__(self, loop: Loop, core: RouterCore, engines: list[FakeEngine]):
        self.loop, self.core, self.engines = loop, core, engines
        config = uvicorn.Config(
            create_app(core), host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self.addresses: list[str] = []
        self.url = ""

    def start(self) -> None:
        self.addresses = [self.loop.run(engine.start()) for engine in self.engines]
        self._serving = self.loop.start(self._server.serve())
        eventually(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.set_engines(self.addresses)
        eventually(lambda: sum(engine.problem is None for engine in self.core.health()[1]) == len(self.engines))

    def stop(self) -> None:
        self._server.should_exit = True
        for engine in self.engines:
            self.loop.run(engine.kill())
        self._serving.result(WAIT_S)

    def set_engines(self, addresses: list[str]) -> None:
        async def on_the_loop() -> None:
            self.core.set_engines(addresses)

        self.loop.run(on_the_loop())

    def kill(self, engine: FakeEngine) -> None:
        self.loop.run(engine.kill())

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 where there is none."""
        wanted = {"model_name": MODEL, **labels}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"paceline_{name}" and sample.labels == wanted:
                    return sample.value
        return 0.0

    def post(self, path: str, body: Any = None, **keywords: Any) -> httpx.Response:
        if body is not None:
            keywords["json"] = body
        return httpx.post(f"{self.url}{path}", timeout=WAIT_S, **keywords)

    def get(self, path: str, **keywords: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=WAIT_S, **keywords)

    def complete(self, **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": MODEL, "prompt": "def f", "max_tokens": 200, **fields})

    def client(self, **keywords: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._client(keywords))

    def async_client(self, **keywords: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._client(keywords))

    def _client(self, keywords: dict[str, Any]) -> dict[str, Any]:
        common = {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": WAIT_S}
        return {**common, **keywords}


def make_served(loop: Loop, tokens: Tokens, engines: list[FakeEngine], **settings: Any) -> Served:
    quick = {"probe_interval_s": 0.02, **settings}
    return Served(loop, RouterCore(MODEL, tokens, RouterSettings(**quick)), engines)


def eventually(check: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
    """The first true value of `check`."""
    until = time.monotonic() + timeout_s
    while not (value := check()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)
    return value
