"""Recurrent states over kernels: a verify takes what stands of a slot's last block into its state by itself.

What is left for other launches, of all layers at once: blocks that no verify goes on from, and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kernels.gated_delta.kernel import gated_delta_replay
from kernels.gated_delta.reference import KeptDelta
from kernels.kept_rows import KeptRows
from kernels.short_conv.kernel import short_conv_replay
from verifier_service.model.device.layout import ChangingInputs
from verifier_service.model.recurrent_state import RecurrentStates


@dataclass(frozen=True)
class StateRows:
    """`tokens` consecutive tokens of a step, padding included. slots int32 [rows], starts int32 [rows + 1], from the
    first of them. kept: None where all tokens are certain.
    """

    tokens: int
    slots: torch.Tensor
    starts: torch.Tensor
    kept: KeptRows | None = None


class KernelStates(RecurrentStates):
    """As RecurrentStates, with room for what two verifies in a row of up to `tokens` tokens keep.

    kept_mixed [layers, places, channels]: convolution inputs; kept_keys [layers, places, key_heads, key_dim],
    kept_decay [layers, places, heads] and kept_corrected [layers, places, heads, value_dim] float32: of the delta rule.
    The room is fixed, so that CUDA graphs may write to it.
    """

    def __init__(self, layers: int, slots: int, *, tokens: int, key_heads: int, **shape: Any):
        super().__init__(layers, slots, **shape)
        heads, key_dim, value_dim = self.memory.shape[2:]
        self._places = 2 * tokens
        self.kept_mixed = self.conv.new_zeros(layers, self._places, self.conv.shape[3])
        self.kept_keys = self.memory.new_zeros(layers, self._places, key_heads, key_dim)
        self.kept_decay = self.memory.new_zeros(layers, self._places, heads)
        self.kept_corrected = self.memory.new_zeros(layers, self._places, heads, value_dim)

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of states with what is kept for their commit, and of checkpoints."""
        kept = (self.kept_mixed, self.kept_keys, self.kept_decay, self.kept_corrected)
        states = self.conv.nbytes + self.memory.nbytes + sum(tensor.nbytes for tensor in kept)
        return states, self.checkpoint_conv.nbytes + self.checkpoint_memory.nbytes

    def kept(self, layer: int) -> KeptDelta:
        """Of one layer."""
        return KeptDelta(self.kept_keys[layer], self.kept_decay[layer], self.kept_corrected[layer])

    def clear(self, slots: Iterable[int]) -> None:
        """Their states become those of no token."""
        for slot in slots:
            self.conv[:, slot].zero_()
            self.memory[:, slot].zero_()

    def settle(self, inputs: ChangingInputs[torch.Tensor]) -> None:
        """Advance the states that no verify row will, and save those that become checkpoints.

        Waits for nothing. A replay starts from the state before the commit, a copy is made after it.
        """
        if inputs.replays.shape[1]:
            slots, first, kept, checkpoints = inputs.replays
            at, into = slots.long(), checkpoints.long()
            self.checkpoint_conv[:, into], self.checkpoint_memory[:, into] = self.conv[:, at], self.memory[:, at]
            self._replay_layers(self.checkpoint_conv, self.checkpoint_memory, checkpoints, first, kept)
        if inputs.commits.shape[1]:
            self._replay_layers(self.conv, self.memory, *inputs.commits)
        if inputs.copies.shape[1]:
            at, into = (part.long() for part in inputs.copies)
            self.checkpoint_conv[:, into], self.checkpoint_memory[:, into] = self.conv[:, at], self.memory[:, at]

    def _replay_layers(
        self, conv: torch.Tensor, memory: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, count: torch.Tensor
    ) -> None:
        """Layers are so many more slots and places."""
        layer = torch.arange(conv.shape[0], device=slots.device)[:, None]
        slots, first = (slots + layer * conv.shape[1]).flatten(), (first + layer * self._places).flatten()
        count = count.repeat(conv.shape[0])
        kept = KeptDelta(*(part.flatten(0, 1) for part in (self.kept_keys, self.kept_decay, self.kept_corrected)))
        short_conv_replay(self.kept_mixed.flatten(0, 1), conv.flatten(0, 1), slots, first, count)
        gated_delta_replay(kept, memory.flatten(0, 1), slots, first, count)
