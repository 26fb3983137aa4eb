"""Tests of the drafter run on one thread; a target and one drafter are made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drafter_service.engine import DrafterEngine
from tests.drafter_service.pairs import settings_for, write_drafter, write_target
from tests.drafter_service.peers import RecordingPeer


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("pair") / "target")


@pytest.fixture(scope="session")
def drafter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drafter(tmp_path_factory.mktemp("pair") / "drafter")


@pytest.fixture(scope="module")
def engine(target_dir: Path, drafter_dir: Path) -> DrafterEngine:
    """Without a thread: whatever is asked is answered on return. Each test has its own link."""
    return DrafterEngine(settings_for(target_dir, drafter_dir, max_contexts=3, max_queue=8), threaded=False)


@pytest.fixture
def peer(engine: DrafterEngine, request: pytest.FixtureRequest) -> Iterator[RecordingPeer]:
    peer = RecordingPeer(request.node.name)
    engine.linked(peer)
    yield peer
    engine.lost(peer)
