"""Paged keys and values of one rank, and who owns which block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class KeyValueCache(Protocol):
    """One attention layer's keys and values, in blocks of tokens, written in place."""

    def write(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys, values [tokens, kv_heads, head_dim] at `rows` [tokens] (block x block_tokens + offset)."""

    def read(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of `blocks` [n], in order: keys and values [n x block_tokens, kv_heads, head_dim]."""

    @property
    def nbytes(self) -> int: ...


class LatentsCache(Protocol):
    """One latent-attention layer's latents, each with its rotary key, in blocks of tokens, written in place.

    All heads read the same latents: there is nothing to divide, every rank holds all of them.
    """

    def write(self, rows: torch.Tensor, latents: torch.Tensor) -> None:
        """Store latents [tokens, width] at `rows` [tokens] (block x block_tokens + offset)."""

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """The tokens of `blocks` [n], in order: [n x block_tokens, width]."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class LayerCache:
    """A KeyValueCache in the compute dtype: [blocks, block_tokens, kv_heads, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor

    def write(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys.view(-1, *self.keys.shape[2:]).index_copy_(0, rows, keys)
        self.values.view(-1, *self.values.shape[2:]).index_copy_(0, rows, values)

    def read(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys.index_select(0, blocks), self.values.index_select(0, blocks)
        return keys.view(-1, *keys.shape[2:]), values.view(-1, *values.shape[2:])

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class LatentCache:
    """A LatentsCache in the compute dtype: [blocks, block_tokens, width]."""

    latents: torch.Tensor

    def write(self, rows: torch.Tensor, latents: torch.Tensor) -> None:
        self.latents.view(-1, self.latents.shape[2]).index_copy_(0, rows, latents)

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        return self.latents.index_select(0, blocks).view(-1, self.latents.shape[2])

    @property
    def nbytes(self) -> int:
        return self.latents.nbytes


class BlockTables:
    """Per slot, the block ids that hold its tokens, in order. Host memory; mutated by the runner only."""

    def __init__(self, slots: int, max_blocks: int, block_tokens: int, blocks: int):
        self.block_tokens, self.blocks = block_tokens, blocks
        self._ids = np.zeros((slots, max_blocks), dtype=np.int64)
        self._count = [0] * slots

    def append(self, slot: int, block: int) -> int:
        """Returns which of the slot's blocks it is. RuntimeError for one that does not exist or a slot that is full."""
        count = self._count[slot]
        if not 0 <= block < self.blocks or count >= self._ids.shape[1]:
            raise RuntimeError(
                f"block {block} (of {self.blocks}) cannot become block {count} (of {self._ids.shape[1]}) of slot {slot}"
            )
        self._ids[slot, count] = block
        self._count[slot] = count + 1
        return count

    def release(self, slot: int) -> None:
        self._count[slot] = 0

    def of(self, slot: int, tokens: int) -> np.ndarray:
        """Ids of the blocks that hold the slot's first `tokens` tokens. RuntimeError if it owns fewer."""
        return self._ids[slot, : self.check(slot, tokens)]

    def check(self, slot: int, tokens: int) -> int:
        """How many blocks hold the slot's first `tokens` tokens. RuntimeError if it owns fewer."""
        count = -(-tokens // self.block_tokens)
        if count > self._count[slot]:
            raise RuntimeError(
                f"slot {slot} owns {self._count[slot]} blocks of {self.block_tokens} tokens, but {tokens} tokens were "
                "planned: the plan must append blocks first"
            )
        return count
