"""Recurrent states of the Gated DeltaNet layers, per slot, and the commit of a verified block.

A verify leaves the committed state untouched and keeps what a replay needs; the commit of its accepted prefix is one
weighted sum over the block, because what a token writes (its corrected value) does not depend on later tokens. The
same sum over a shorter prefix gives the state at a block boundary inside the verified block, for a checkpoint. Where
the last bit must not depend on blocks, tokens are replayed one after the other instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from verifier_service.model.delta_rule import replayed_at_once

Replay = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Verified:
    """What one layer keeps of a verify of R rows x Q tokens until its outcome is known.

    mixed [R, window + Q, channels]: convolution inputs, the committed ones first; keys [R, heads, Q, key_dim];
    decay [R, heads, Q] and corrected [R, heads, Q, value_dim]: what the replay takes.
    """

    mixed: torch.Tensor
    keys: torch.Tensor
    decay: torch.Tensor
    corrected: torch.Tensor


class RecurrentStates:
    """conv [layers, slots, window, channels] and memory [layers, slots, heads, key_dim, value_dim] (float32).

    window: the convolution's width - 1. checkpoint_conv and checkpoint_memory: the same with checkpoints for slots, as
    many as fit into checkpoint_bytes, at most max_checkpoints. replay: a function of delta_rule.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        *,
        window: int,
        channels: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: str | torch.device,
        checkpoint_bytes: int = 0,
        max_checkpoints: int = 0,
        replay: Replay = replayed_at_once,
    ):
        self._replay = replay
        self.conv = torch.zeros(layers, slots, window, channels, dtype=dtype, device=device)
        self.memory = torch.zeros(layers, slots, heads, key_dim, value_dim, device=device)
        self.bytes_per_state = (self.conv.nbytes + self.memory.nbytes) // slots
        self.checkpoints = min(checkpoint_bytes // self.bytes_per_state, max_checkpoints)
        self.checkpoint_conv = self.conv.new_zeros(layers, self.checkpoints, *self.conv.shape[2:])
        self.checkpoint_memory = self.memory.new_zeros(layers, self.checkpoints, *self.memory.shape[2:])
        self._verified: dict[int, Verified] = {}
        self._slots: tuple[int, ...] = ()

    def begin_verify(self, slots: Sequence[int]) -> None:
        """The rows of the verify that the layers are about to keep."""
        self._verified.clear()
        self._slots = tuple(slots)

    def keep(self, layer: int, verified: Verified) -> None:
        self._verified[layer] = verified

    def commit(self, kept: Mapping[int, int], saved: Sequence[tuple[int, int, int]] = ()) -> None:
        """Advance the rows of the last verify by kept[slot] tokens each; rows without an entry stay where they were.

        saved: (slot, count, checkpoint): the checkpoint becomes the state after `count` tokens of the slot's row of
        the verify; count 0: the slot's state after this commit.
        """
        copied = list(saved)
        if self._verified:
            row_of = {slot: row for row, slot in enumerate(self._slots)}
            if inside := [save for save in saved if save[1]]:
                copied = [save for save in saved if not save[1]]
                conv, memory = self._replayed([row_of[save[0]] for save in inside], [save[1] for save in inside])
                at = self._indices([save[2] for save in inside])
                self.checkpoint_conv[:, at], self.checkpoint_memory[:, at] = conv, memory
            if slots := [slot for slot in self._slots if slot in kept]:
                conv, memory = self._replayed([row_of[slot] for slot in slots], [kept[slot] for slot in slots])
                at = self._indices(slots)
                self.conv[:, at], self.memory[:, at] = conv, memory
            self._verified.clear()
        if copied:  # a verify of one token a row is committed by now
            at = self._indices([save[0] for save in copied])
            into = self._indices([save[2] for save in copied])
            self.checkpoint_conv[:, into], self.checkpoint_memory[:, into] = self.conv[:, at], self.memory[:, at]

    def save(self, layer: int, slot: int, checkpoint: int) -> None:
        """One layer's part of a checkpoint, in the middle of a forward."""
        self.checkpoint_conv[layer, checkpoint] = self.conv[layer, slot]
        self.checkpoint_memory[layer, checkpoint] = self.memory[layer, slot]

    def restore(self, restored: Sequence[tuple[int, int]]) -> None:
        """(slot, checkpoint): the slot's state becomes the checkpoint's."""
        slots = self._indices([slot for slot, _ in restored])
        at = self._indices([checkpoint for _, checkpoint in restored])
        self.conv[:, slots], self.memory[:, slots] = self.checkpoint_conv[:, at], self.checkpoint_memory[:, at]

    def _replayed(self, rows: list[int], counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """conv and memory [layers, rows, ...] after counts[i] tokens of row rows[i] of the last verify."""
        kept, slots = self._indices(counts), self._indices([self._slots[row] for row in rows])
        chosen = None if len(rows) == len(self._slots) else self._indices(rows)
        layers = [self._verified[layer] for layer in range(self.conv.shape[0])]
        mixed = _stack([layer.mixed for layer in layers], chosen)  # [layers, R, window + Q, channels]
        keys = _stack([layer.keys for layer in layers], chosen)
        decay = _stack([layer.decay for layer in layers], chosen)  # [layers, R, heads, Q]
        corrected = _stack([layer.corrected for layer in layers], chosen)

        memory = self._replay(self.memory[:, slots], keys, decay, corrected, kept)
        at = kept[:, None] + torch.arange(self.conv.shape[2], device=kept.device)  # [R, window]
        return mixed[:, torch.arange(len(rows), device=kept.device)[:, None], at], memory

    def _indices(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.conv.device)


def _stack(tensors: list[torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
    stacked = torch.stack(tensors)
    return stacked if rows is None else stacked[:, rows]
