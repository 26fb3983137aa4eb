"""Work on what a step has computed, while the device computes the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from verifier_service.marks import Mark


class Beside:
    """device: as torch names it. On a CPU, where nothing is under way while the host works, this does nothing.

    Otherwise the work, and the host's waits for it, would come behind all of the step that was launched last.
    """

    def __init__(self, device: str):
        self._stream = torch.cuda.Stream(device) if device.startswith("cuda") else None

    @contextmanager
    def after(self, done: Mark) -> Iterator[None]:
        """What is given to the device inside goes to a stream of its own, once `done` has come to pass.

        What is launched afterwards comes behind it, whether or not the host has waited for it: a drafter in this
        process reads what was written here.
        """
        if self._stream is None:
            yield
            return
        assert isinstance(done, torch.cuda.Event), "a mark of this device"
        self._stream.wait_event(done)
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
