from pathlib import Path

import pytest

from tests.paceline.bench.tiny_pair import write_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Directories of a random target and its random drafter."""
    return write_pair(tmp_path_factory.mktemp("pair"))
