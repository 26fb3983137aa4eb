"""Tests of the drafter run on one thread; a target and one drafter are made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.drafter_service.pairs import write_drafter, write_target


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("pair") / "target")


@pytest.fixture(scope="session")
def drafter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drafter(tmp_path_factory.mktemp("pair") / "drafter")
