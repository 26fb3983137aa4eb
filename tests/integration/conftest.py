"""The shipped pair, or a random-weight one where it is absent, and the application serving it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.serving import Served, served

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "tiny"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of target and drafter."""
    target, drafter = SHIPPED / "target", SHIPPED / "drafter"
    if (target / "config.json").exists() and (drafter / "config.json").exists():
        return target, drafter
    from tests.integration.pair import build_pair

    return build_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def arguments(checkpoints: tuple[Path, Path]) -> dict[str, Any]:
    """Builder arguments: two ranks on CPU, one drafter, limits small enough for two cores."""
    target, drafter = checkpoints
    common = {"device": "cpu", "dtype": "float32", "start_timeout_s": 150}
    return {
        "model_name": "tiny",
        "verifier": {
            **common,
            "target": str(target),
            "tensor_parallel_size": 2,
            "max_requests": 16,
            "kv_cache_tokens": 16384,
            "rank_resources": {"CPU": 0.4},
            "speculation": {"adaptive": False},  # whether or not drafts pay on this machine
        },
        "drafter": {**common, "checkpoint": str(drafter), "resources": {"CPU": 0.4}},
    }


@pytest.fixture(scope="module")
def app(arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One application for a module's tests; they leave it able to serve."""
    with served(arguments, tmp_path_factory.mktemp("app")) as running:
        yield running
