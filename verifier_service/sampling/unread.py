"""Tokens on their way from the device to the host."""

from __future__ import annotations

import torch


class Unread:
    """tokens int64 [rows], not to be changed any more. `read` waits for them and for nothing that is launched later."""

    def __init__(self, tokens: torch.Tensor):
        self._tokens = tokens
        self._there: torch.cuda.Event | None = None
        if tokens.is_cuda:
            pinned = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens = pinned.copy_(tokens, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[int]:
        if self._there is not None:
            self._there.synchronize()
        return self._tokens.tolist()
