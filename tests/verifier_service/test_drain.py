"""An engine at its end waits for its requests, and no longer than it may."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cluster.api.engine_client import EngineClient
from tests.verifier_service import test_port
from tests.verifier_service.test_engine import WAIT_S, Guesser, expected, make_engine, request
from tests.verifier_service.test_port import Slow, served
from verifier_service import drain
from verifier_service.drain import drained
from verifier_service.port import EnginePort

__all__ = ["served"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "LOOK_S", 0.01)


def run(port: EnginePort, check: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def connected() -> None:
        engine = await EngineClient.connect(port.address, WAIT_S)
        try:
            await check(engine)
        finally:
            engine.close()

    asyncio.run(connected())


def test_requests_under_way_finish_before_the_end(served):
    async def check(engine: EngineClient) -> None:
        stream = engine.submit(request("a", output=100))
        begun = (await anext(stream)).token_ids
        assert await drained(engine, WAIT_S)
        assert (await engine.probe(WAIT_S)).running == 0
        assert [*begun, *[token async for delta in stream for token in delta.token_ids]] == expected("a", output=100)

    run(served(), check)


def test_what_takes_too_long_is_left_to_others(served):
    class Stuck(Slow):
        def forward(self, plan):
            test_port.time.sleep(0.05)
            return super().forward(plan)

    async def check(engine: EngineClient) -> None:
        await anext(engine.submit(request("a", output=100)))
        assert not await drained(engine, 0.05)
        assert (await engine.probe(WAIT_S)).running == 1

    run(served(make_engine(Stuck(4, 200, 4, max_context=128), Guesser(0.0), blocks=200)), check)


def test_an_engine_that_is_gone_is_not_waited_for(served):
    async def check(engine: EngineClient) -> None:
        engine.close()
        assert await drained(engine, WAIT_S)

    run(served(), check)
