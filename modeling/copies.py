"""Host tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; itself on a CPU.

    From pinned memory, which torch keeps until it has been read: for any other, the host waits until a GPU has done all
    that it has to do.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
