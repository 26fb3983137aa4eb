"""A real target and a real drafter in one process: a link that breaks in an unforeseen way is made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.contracts import EngineRequest
from cluster.link.drafter_end import DrafterServer
from deploy.link import make_link
from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from tests.paceline.bench.tiny_pair import write_pair
from tests.verifier_service.test_engine import Inbox
from tests.verifier_service.test_renewal import eventually
from verifier_service.config import VerifierSettings
from verifier_service.model.runner import TargetRunner
from verifier_service.proposers import renewal
from verifier_service.rank import build_engine

SECRET = "s"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


def verifier(pair: tuple[Path, Path], mode: str) -> VerifierSettings:
    return VerifierSettings.model_validate(
        {
            "target": str(pair[0]),
            "drafter": str(pair[1]),
            "dtype": "float32",
            "device": "cpu",
            "kv_cache_tokens": 2048,
            "max_requests": 4,
            "speculation": {"mode": mode, "soft_deadline_s": 2.0, "adaptive": False},
            "link": {"token": SECRET},
        }
    )


def target(pair: tuple[Path, Path], blocks: int = 128) -> TargetRunner:
    return TargetRunner(pair[0], num_blocks=blocks, block_tokens=16, num_slots=4, dtype=torch.float32, device="cpu")


class BreaksOnce:
    """A MakeLink whose first link raises in its fifth ask."""

    def __init__(self) -> None:
        self.links: list[Any] = []

    def __call__(self, *settings: Any, **more: Any) -> Any:
        link: Any = make_link(*settings, **more)
        self.links.append(link)
        if len(self.links) == 1:
            plain_ask, asks = link.ask, iter(range(100))

            def ask(wanted: Any) -> None:
                if next(asks) == 4:
                    raise RuntimeError("an error that nobody foresaw")
                plain_ask(wanted)

            link.ask = ask
        return link


def texts(engine: Any, prefix: str) -> list[list[int]]:
    inbox = Inbox()
    names = [f"{prefix}{i}" for i in range(3)]
    for i, name in enumerate(names):
        engine.submit(EngineRequest(name, tuple(range(5, 9 + 7 * i)), seed=1, max_new_tokens=60), inbox)
    inbox.wait(*names)
    return [inbox.text(name) for name in names]


@pytest.mark.parametrize("mode", ["disaggregated", "colocated"])
def test_a_link_that_fails_in_an_unforeseen_way_is_made_again_and_no_text_changes(pair, monkeypatch, mode):
    monkeypatch.setattr(renewal, "FIRST_DELAY_S", 0.01)
    links = BreaksOnce()
    plain = build_engine(verifier(pair, "none"), target(pair), None, "plain", None)
    plain.start()
    expected = texts(plain, "plain")
    plain.stop()
    drafter = DrafterEngine(
        DrafterSettings(checkpoint=str(pair[1]), target=str(pair[0]), dtype="float32", device="cpu", window=64)
    )
    server = DrafterServer(drafter, token=SECRET)
    engine = build_engine(verifier(pair, mode), target(pair), None, "drafting", links)
    engine.set_drafters([server.address])
    engine.start()
    try:
        assert eventually(lambda: engine.status().linked)
        assert texts(engine, "broken") == expected
        assert eventually(lambda: len(links.links) == 2 and engine.status().linked)
        before = engine.status().counters
        assert texts(engine, "renewed") == expected
        after = engine.status().counters
    finally:
        engine.stop()
        server.stop()
        drafter.stop()
    assert before["drafting_failures"] == 1
    assert after["draft_answers"] > before["draft_answers"]


def test_a_context_is_no_longer_than_the_cache_is_large(pair):
    settings = verifier(pair, "none")
    assert build_engine(settings, target(pair, blocks=6), None, "small", None).info.max_context == 96
    assert build_engine(settings, target(pair), None, "large", None).info.max_context == 256
