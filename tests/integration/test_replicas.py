"""Two verifiers and two drafters: each verifier has a drafter of its own, and one's death is the other's work."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from cluster.api.engine_client import EngineClient
from cluster.contracts import Status
from cluster.tls import Access
from tests.integration.serving import Served, eventually, served
from tests.integration.test_serve import Streams, complete

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
REPLACED_S = 90.0


@pytest.fixture(scope="module")
def app(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    verifier = {**arguments["verifier"], "replicas": 2, "tensor_parallel_size": 1, "rank_resources": {"CPU": 0.3}}
    drafter = {**arguments["drafter"], "replicas": 2, "resources": {"CPU": 0.3}}
    with served({**arguments, "verifier": verifier, "drafter": drafter}, tmp_path_factory.mktemp("app")) as running:
        yield running


@pytest.fixture
def client(app: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0, timeout=120)


def statuses(app: Served) -> list[Status]:
    async def ask(address: str) -> Status:
        engine = await EngineClient.connect(address, 5.0, Access(app.secret))
        try:
            return await engine.probe(5.0)
        finally:
            engine.close()

    return [asyncio.run(ask(address)) for address in app.verifiers()]


def wait_until_paired(app: Served) -> None:
    eventually(
        lambda: len(found := statuses(app)) == 2 and len({s.drafter_id for s in found if s.linked}) == 2,
        REPLACED_S,
        lambda: f"the verifiers are not linked to a drafter each: {statuses(app)}",
    )


def moved(app: Served) -> float:
    """Choices that went to another engine."""
    lines = httpx.get(f"{app.url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("paceline_request_failovers_total"))


def test_each_of_two_verifiers_links_to_a_drafter_of_its_own(app):
    wait_until_paired(app)
    assert len(app.processes("DrafterModel")) == 2


def test_a_replicas_death_moves_its_requests_to_the_other_and_no_text_changes(app, client):
    wait_until_paired(app)
    expected = complete(client, app, 200)
    ranks = app.processes("VerifierRank")
    with Streams(client, app, 8) as texts:
        running = [status.running for status in statuses(app)]
        victim = next(name for name in ranks if app.members()[running.index(max(running))].id in name)
        os.kill(ranks[victim], signal.SIGKILL)
    assert max(running) > 0
    assert moved(app) > 0
    assert [text == expected for text in texts] == [True] * 8
    eventually(
        lambda: len(now := app.processes("VerifierRank")) == 2 and victim not in now and len(app.verifiers()) == 2,
        REPLACED_S,
        lambda: f"the replica was not replaced: {app.processes('VerifierRank')}",
    )
    assert complete(client, app, 200) == expected
