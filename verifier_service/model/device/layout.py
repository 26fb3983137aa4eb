"""What a step tells the device, in one buffer of int32 that one copy brings there.

First comes a fixed part, of a size that the step's padded shape decides, so that a CUDA graph can read it from a fixed
place; behind it what is different every step and is read by launches outside of graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

T = TypeVar("T", np.ndarray, torch.Tensor)

ALIGNED = 4  # words: a kernel is compiled once more for an argument that does not lie at a multiple of 16 bytes


@dataclass(frozen=True)
class FixedInputs(Generic[T]):
    """token_ids [rows], a negative one -1 - i standing for the token that the step before took at row i of its logits;
    starts, slots [requests]; query_starts [requests + 1]. kept_first, kept_standing, kept_into [requests]: of verify
    rows over recurrent states, see kernels.kept_rows. Padding: requests without rows at the end, slot 0, and tokens
    that belong to no request.
    """

    token_ids: T
    starts: T
    slots: T
    query_starts: T
    kept_first: T
    kept_standing: T
    kept_into: T


@dataclass(frozen=True)
class ChangingInputs(Generic[T]):
    """logit_rows [any]: rows of the step whose logits are wanted. cells, blocks [moves]: what to enter into the block
    tables. commits [3, any]: slot, where its tokens are kept, how many stand, of those that no verify row of this step
    goes on from. replays [4, any]: the same of a state that goes into a checkpoint, and which. copies [2, any]: slot,
    checkpoint.
    """

    logit_rows: T
    cells: T
    blocks: T
    commits: T
    replays: T
    copies: T


@dataclass(frozen=True)
class FixedLayout:
    """The fixed part of a step of `requests` requests and `rows` tokens, padding included."""

    requests: int
    rows: int

    @property
    def _sizes(self) -> tuple[int, ...]:
        each = self.requests
        return self.rows, each, each, each + 1, each, each, each

    @property
    def words(self) -> int:
        return sum(map(_room, self._sizes))

    def of(self, words: T) -> FixedInputs[T]:
        """Views into a buffer that begins with the fixed part."""
        return FixedInputs(*_cut(words, self._sizes))


@dataclass(frozen=True)
class ChangingLayout:
    wanted: int
    moves: int
    commits: int
    replays: int
    copies: int

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.wanted, self.moves, self.moves, 3 * self.commits, 4 * self.replays, 2 * self.copies

    @property
    def words(self) -> int:
        return sum(map(_room, self._sizes))

    def of(self, words: T) -> ChangingInputs[T]:
        """Views into a buffer that begins with the changing part."""
        logit_rows, cells, blocks, commits, replays, copies = _cut(words, self._sizes)
        return ChangingInputs(
            *(logit_rows, cells, blocks, commits.reshape(3, self.commits)),
            *(replays.reshape(4, self.replays), copies.reshape(2, self.copies)),
        )


def _cut(words: T, sizes: Sequence[int]) -> list[T]:
    parts, at = [], 0
    for size in sizes:
        parts.append(words[at : at + size])
        at += _room(size)
    return parts


def _room(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
