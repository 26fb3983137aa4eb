"""In which order a device gets what is done beside a step; streams are stood in for, as there need be no GPU."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from verifier_service.beside import Beside


class Streams:
    """Notes who waits for what."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.current = FakeStream(self, "main")


class FakeStream:
    device = "cuda:0"

    def __init__(self, streams: Streams, name: str):
        self._streams, self.name = streams, name

    def wait_event(self, event: Any) -> None:
        self._streams.said.append(f"{self.name} waits for the step")

    def wait_stream(self, other: FakeStream) -> None:
        self._streams.said.append(f"{self.name} waits for {other.name}")


def test_what_is_launched_afterwards_comes_behind_what_was_done_beside_a_step(monkeypatch: pytest.MonkeyPatch):
    streams = Streams()

    @contextmanager
    def entered(stream: FakeStream):
        before, streams.current = streams.current, stream
        yield
        streams.current = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(streams, "aside"))
    monkeypatch.setattr(torch.cuda, "Event", type(streams))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.current)
    with Beside("cuda").after(streams):  # type: ignore[arg-type]
        streams.said.append(f"launched on {streams.current.name}")
    assert streams.said == ["aside waits for the step", "launched on aside", "main waits for aside"]


def test_on_a_cpu_nothing_is_put_aside():
    with Beside("cpu").after(0.0):
        pass
