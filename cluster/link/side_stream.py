"""A stream of its own for what a link moves, so that it runs beside what a device computes instead of behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """On CPU, where nothing is under way while the host works, this does nothing.

    A link's threads would else share the device's default stream with a service's steps: a receive would be posted
    behind the forward that is running, and the peer's send would spin until that is over.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def here(self) -> Iterator[None]:
        """What is given to the device inside goes to this stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def hand_over(self, tensor: torch.Tensor) -> None:
        """What was made here is used, and may be dropped, on the device's default stream. Waits until it is there."""
        if self._stream is not None:
            self._stream.synchronize()
            tensor.record_stream(torch.cuda.default_stream(tensor.device))
