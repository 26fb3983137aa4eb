"""Recurrent states whose verify and commit run over kernels, all layers of a commit in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernels.delta_inputs.reference import DeltaInputs
from kernels.gated_delta.kernel import gated_delta_commit, gated_delta_replay
from kernels.gated_delta.reference import BlockOutcome
from kernels.short_conv.kernel import short_conv_commit
from verifier_service.model.device.layout import ChangingInputs
from verifier_service.model.recurrent_state import RecurrentStates


@dataclass(frozen=True)
class StateRows:
    """`tokens` consecutive tokens of a step, padding included. slots int32 [rows], starts int32 [rows + 1], from the
    first of them.
    """

    tokens: int
    slots: torch.Tensor
    starts: torch.Tensor


class KernelStates(RecurrentStates):
    """As RecurrentStates, with room for what the commit of a verify of up to `tokens` tokens needs.

    kept_mixed [layers, tokens, channels]: convolution inputs; kept_keys [layers, tokens, key_heads, key_dim] float32;
    kept_decay [layers, tokens, heads], kept_corrected [layers, tokens, heads, value_dim]: of the delta rule's verify.
    The room is fixed, so that CUDA graphs may write to it. stepwise: commits go token by token, to bits that do not
    depend on how tokens were cut into blocks.
    """

    def __init__(self, layers: int, slots: int, *, tokens: int, key_heads: int, stepwise: bool = False, **shape: Any):
        super().__init__(layers, slots, **shape)
        self._stepwise, self._delta_commit = stepwise, gated_delta_replay if stepwise else gated_delta_commit
        heads, key_dim, value_dim = self.memory.shape[2:]
        self.tokens = tokens
        self.kept_mixed = self.conv.new_zeros(layers, tokens, self.conv.shape[3])
        self.kept_keys = self.memory.new_zeros(layers, tokens, key_heads, key_dim)
        self.kept_decay = self.memory.new_zeros(layers, tokens, heads)
        self.kept_corrected = self.memory.new_zeros(layers, tokens, heads, value_dim)

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of states with what is kept for their commit, and of checkpoints."""
        kept = (self.kept_mixed, self.kept_keys, self.kept_decay, self.kept_corrected)
        states = self.conv.nbytes + self.memory.nbytes + sum(tensor.nbytes for tensor in kept)
        return states, self.checkpoint_conv.nbytes + self.checkpoint_memory.nbytes

    def keep_tokens(self, layer: int, mixed: torch.Tensor, inputs: DeltaInputs, done: BlockOutcome) -> None:
        """Of one layer's verify, until the next commit."""
        count = len(mixed)
        self.kept_mixed[layer, :count].copy_(mixed)
        self.kept_keys[layer, :count].copy_(inputs.key)
        self.kept_decay[layer, :count].copy_(inputs.log_decay if self._stepwise else done.decay)
        self.kept_corrected[layer, :count].copy_(done.corrected)

    def advance_at_once(
        self, layer: int, mixed: torch.Tensor, inputs: DeltaInputs, done: BlockOutcome, rows: StateRows
    ) -> None:
        """All tokens of one layer's rows are kept, for they are certain. Only of states that are stepwise."""
        assert self._stepwise, "what is kept differs"
        first, count = rows.starts[:-1], rows.starts.diff()
        short_conv_commit(mixed, self.conv[layer], rows.slots, first, count)
        gated_delta_replay(inputs.key, inputs.log_decay, done.corrected, self.memory[layer], rows.slots, first, count)

    def settle(self, inputs: ChangingInputs[torch.Tensor]) -> None:
        """Advance the states by what stands of the last verify, and save those that become checkpoints.

        Waits for nothing. A replay starts from the state before the commit, a copy is made after it.
        """
        if inputs.replays.shape[1]:
            slots, first, kept, checkpoints = inputs.replays
            at, into = slots.long(), checkpoints.long()
            self.checkpoint_conv[:, into], self.checkpoint_memory[:, into] = self.conv[:, at], self.memory[:, at]
            self._advance(self.checkpoint_conv, self.checkpoint_memory, checkpoints, first, kept)
        if inputs.commits.shape[1]:
            self._advance(self.conv, self.memory, *inputs.commits)
        if inputs.copies.shape[1]:
            at, into = (part.long() for part in inputs.copies)
            self.checkpoint_conv[:, into], self.checkpoint_memory[:, into] = self.conv[:, at], self.memory[:, at]

    def _advance(
        self, conv: torch.Tensor, memory: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, kept: torch.Tensor
    ) -> None:
        """Layers are so many more slots and tokens."""
        layer = torch.arange(conv.shape[0], device=slots.device)[:, None]
        slots, first = (slots + layer * conv.shape[1]).flatten(), (first + layer * self.tokens).flatten()
        kept = kept.repeat(conv.shape[0])
        short_conv_commit(self.kept_mixed.flatten(0, 1), conv.flatten(0, 1), slots, first, kept)
        self._delta_commit(
            *(self.kept_keys.flatten(0, 1), self.kept_decay.flatten(0, 1), self.kept_corrected.flatten(0, 1)),
            *(memory.flatten(0, 1), slots, first, kept),
        )
