"""The context KV: a preallocated pool of slots, each of window rows with room for one block behind them.

While a block is drafted, its own keys and values stand right behind its context's rows, so that attention reads one
contiguous stretch and nothing is copied. They are scratch: the next append or draft overwrites them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from drafter_service.context import Context, Placement
from drafter_service.fused import FusedDFlash
from drafter_service.model import PADDING

STAGED_ROWS = 4096  # of one GEMM: bounds what a prefill's appends take beside the pool


class ContextPool:
    """kv [layers, slots x stride, 2, kv_heads, head_dim]; positions [slots x stride] int64, PADDING where never used.

    A slot's rows begin at slot x stride; stride = window + block size. Memory is committed as slots are first used.
    """

    def __init__(self, model: FusedDFlash, slots: int, window: int):
        self._model = model
        self.window = window
        self.stride = window + model.config.block_size
        shape = (len(model.layers), slots * self.stride, 2, model.kv_heads, model.head_dim)
        self.kv = _zeros(shape, model.dtype, model.device)
        self.positions = torch.full((slots * self.stride,), PADDING, dtype=torch.int64, device=model.device)
        self._staged: list[tuple[np.ndarray, np.ndarray, Tensor]] = []
        self._staged_slots: set[int] = set()
        self._staged_rows = 0

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + self.positions.nbytes

    def first_row(self, context: Context) -> int:
        return context.slot * self.stride

    def stage(self, placement: Placement, features: Tensor) -> None:
        """Take features [count, hidden] of an append; `flush` writes what was staged, in one go.

        Rows of one slot may be staged once per flush: a second time flushes first, so that no row is written twice.
        """
        context, count = placement.context, len(placement.rows)
        if context.slot in self._staged_slots or self._staged_rows + count > STAGED_ROWS:
            self.flush()
        if count == 0:
            return
        positions = np.arange(placement.first, placement.first + count)
        rows = np.array(placement.rows) + self.first_row(context)
        self._staged.append((rows, positions, features[placement.skip : placement.skip + count]))
        self._staged_slots.add(context.slot)
        self._staged_rows += count

    def copy(self, rows: Sequence[int], sources: Sequence[int], first: int) -> None:
        """Rows of the pool into others, whose positions begin at `first`. What was staged is written before."""
        self.flush()
        device = self._model.device
        to, of = (torch.tensor(each, device=device) for each in (rows, sources))
        for begin in range(0, len(rows), STAGED_ROWS):
            own = slice(begin, begin + STAGED_ROWS)
            self.kv.index_copy_(1, to[own], self.kv.index_select(1, of[own]))
        self.positions.index_copy_(0, to, torch.arange(first, first + len(rows), device=device))

    def flush(self) -> None:
        if not self._staged:
            return
        rows, positions, features = zip(*self._staged)
        self._staged.clear()
        self._staged_slots.clear()
        self._staged_rows = 0
        self._write(_joined(rows), _joined(positions), features)

    def _write(self, rows: np.ndarray, positions: np.ndarray, features: Sequence[Tensor]) -> None:
        device = self._model.device
        at, places = torch.from_numpy(rows).to(device), torch.from_numpy(positions).to(device)
        self.kv.index_copy_(1, at, self._model.context_rows(self._flat(features), places))
        self.positions.index_copy_(0, at, places)

    def _flat(self, features: Sequence[Tensor]) -> Tensor:
        """[rows, hidden], where the model is."""
        flat = features[0] if len(features) == 1 else torch.cat([each.to(self._model.dtype) for each in features])
        return flat.to(self._model.device)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros come from calloc: the kernel hands out pages when they are first touched. torch.zeros touches all.
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
