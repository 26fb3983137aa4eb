from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.link import echo

ROOT = Path(__file__).parents[3]


class DrafterProcess:
    """An echo drafter in a process of its own."""

    def __init__(self, name: str, hard_deadline_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.link.echo", name, str(hard_deadline_s)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        self.address = self.stdout.readline().strip()

    def signal(self, number: int) -> None:
        """A stop is awaited: on another core the process runs on for a moment."""
        self.process.send_signal(number)
        if number == signal.SIGSTOP:
            state = Path(f"/proc/{self.process.pid}/stat")
            echo.eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.stdout.close()


@pytest.fixture
def stops() -> Iterator[Callable[[Any], Any]]:
    """`stops(thing)` returns the thing and stops it after the test."""
    things: list[Any] = []

    def register(thing: Any) -> Any:
        things.append(thing)
        return thing

    yield register
    for thing in reversed(things):
        thing.stop()


@pytest.fixture
def drafter_process() -> Iterator[DrafterProcess]:
    """A drafter named "first" that may be killed or stopped."""
    process = DrafterProcess("first", echo.HARD_DEADLINE_S)
    try:
        yield process
    finally:
        process.end()
