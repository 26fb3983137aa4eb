"""Real targets on a real drafter that cannot hold all their contexts: each gets drafts, nothing is sent in vain."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.contracts import EngineRequest
from cluster.link.drafter_end import DrafterServer
from deploy.link import make_link
from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from tests.integration.test_renewal import SECRET, pair, target, verifier
from tests.verifier_service.test_engine import Inbox
from tests.verifier_service.test_renewal import eventually
from verifier_service.engine import Engine
from verifier_service.rank import build_engine

__all__ = ["pair"]
REQUESTS, OUTPUT = 4, 100


def requests(prefix: str) -> list[EngineRequest]:
    return [
        EngineRequest(f"{prefix}{i}", tuple(range(5, 40 + 7 * i)), seed=1, max_new_tokens=OUTPUT)
        for i in range(REQUESTS)
    ]


def texts(engines: list[Engine]) -> list[list[list[int]]]:
    """Of all engines' requests, which run at the same time."""
    inboxes = [Inbox() for _ in engines]
    for number, (engine, inbox) in enumerate(zip(engines, inboxes)):
        for request in requests(f"e{number}r"):
            engine.submit(request, inbox)
    for number, inbox in enumerate(inboxes):
        inbox.wait(*(f"e{number}r{i}" for i in range(REQUESTS)))
    return [[inbox.text(f"e{number}r{i}") for i in range(REQUESTS)] for number, inbox in enumerate(inboxes)]


@pytest.mark.parametrize("verifiers", [2, 3])
def test_verifiers_that_want_more_contexts_than_there_are_share_them_and_send_each_token_once(
    pair: tuple[Path, Path], verifiers: int
):
    with ExitStack() as stack:
        plain = build_engine(verifier(pair, "none"), target(pair), None, "plain", None)
        stack.callback(plain.stop)
        plain.start()
        (expected,) = texts([plain])
        drafter = DrafterEngine(
            DrafterSettings(checkpoint=str(pair[1]), target=str(pair[0]), dtype="float32", device="cpu", max_contexts=3)
        )
        stack.callback(drafter.stop)
        server = DrafterServer(drafter, token=SECRET)
        stack.callback(server.stop)
        engines = [
            build_engine(verifier(pair, "disaggregated"), target(pair), None, f"v{i}", make_link)
            for i in range(verifiers)
        ]
        for engine in engines:
            stack.callback(engine.stop)
            engine.set_drafters([server.address])
            engine.start()
        assert eventually(lambda: all(engine.status().linked for engine in engines))
        assert texts(engines) == [expected] * verifiers
        counters = [engine.status().counters for engine in engines]
        turned_away = drafter.counters["turned_away"] + drafter.counters["evicted"]
    committed = sum(len(request.prompt_ids) + OUTPUT for request in requests("")) * verifiers
    longest = max(len(request.prompt_ids) + OUTPUT for request in requests(""))
    assert turned_away > 0, "there was room for everyone: this proves nothing"
    assert all(each["drafted_tokens"] > 0 for each in counters)
    assert sum(each["context_tokens"] for each in counters) <= committed + turned_away * longest
    assert turned_away <= 8 * verifiers
