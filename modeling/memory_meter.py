"""What a process takes of a device's memory while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Meter(Protocol):
    """A device's memory, in bytes."""

    def outside(self) -> tuple[int, int]:
        """(taken by anything but this process's tensors, total): other processes, the driver's context, loaded kernels,
        buffers of communicators."""

    def held(self) -> int:
        """By this process's tensors, what has been freed given back before."""

    def peak(self) -> int:
        """The most of held() since it was called, or peak() was."""


class CudaMeter:
    """A Meter of a CUDA device, None = the current one. Counts whole segments of torch's allocator, gaps included."""

    def __init__(self, device: torch.device | None = None):
        self._device = device

    def outside(self) -> tuple[int, int]:
        import torch

        held = self.held()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - held, total

    def held(self) -> int:
        import torch

        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        import torch

        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_reserved(self._device)
        self.held()
        return peak
