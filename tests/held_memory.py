"""A CPU's memory, metered as a GPU's is."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldMemory(TorchDispatchMode):
    """A Meter (modeling.memory_meter): every storage that an operation makes, until let go. total: of the device."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.now = self.most = 0
        self._total = total
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                weakref.finalize(storage, self._freed, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return made

    def _freed(self, size: int) -> None:
        self.now -= size

    def outside(self) -> tuple[int, int]:
        return 0, self._total

    def held(self) -> int:
        self.most = self.now
        return self.now

    def peak(self) -> int:
        most, self.most = self.most, self.now
        return most
