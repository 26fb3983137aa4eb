"""Gated DeltaNet that takes every token by itself, so that its bits depend on the tokens before it alone.

A chunked or blocked form is faster, but sums in an order that follows from where chunks and drafts begin.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from modeling.operations import Operations
from verifier_service.model.delta_rule import token_by_token
from verifier_service.model.gated_delta_net import DeltaNetWeights, RaggedGatedDeltaNet
from verifier_service.model.recurrent_state import RecurrentStates, Verified
from verifier_service.model.step import PrefillPart, VerifyWindow


class StepwiseGatedDeltaNet(RaggedGatedDeltaNet):
    """As RaggedGatedDeltaNet. Its states must replay with `replayed_token_by_token`."""

    def __init__(self, weights: DeltaNetWeights, *, operations: Operations, **shape: Any):
        super().__init__(weights, operations=operations, **shape)
        self.sigmoid, self.silu = operations.elementwise(torch.sigmoid), operations.elementwise(F.silu)
        self.softplus, self.exp = operations.elementwise(F.softplus), operations.elementwise(torch.exp)

    def _gates(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The decay itself and beta."""
        decay = self.exp(self.softplus(a + self.dt_bias).mul_(self.negative_rate))
        return decay, self.sigmoid(b)

    def _verify(
        self,
        states: RecurrentStates,
        verify: VerifyWindow,
        mixed: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        if verify.gather is not None:
            mixed, decay, beta = (x.index_select(0, verify.gather) for x in (mixed, decay, beta))
        rows, longest = verify.rows, verify.longest
        conv, memory = states.conv[self.state_layer], states.memory[self.state_layer]
        window = self._verify_window(conv, verify, mixed)
        decay, beta = decay.view(rows, longest, self.heads), beta.view(rows, longest, self.heads)
        own = memory.index_select(0, verify.slots)
        output, key, corrected = self._run(window, decay, beta, own)
        if longest == 1:
            conv.index_copy_(0, verify.slots, window[:, 1:])
            memory.index_copy_(0, verify.slots, own)
        else:
            states.keep(self.state_layer, Verified(window, key, decay.transpose(1, 2), corrected))
        output = output.flatten(0, 1)
        return output if verify.scatter is None else output.index_select(0, verify.scatter)

    def _prefill(
        self,
        states: RecurrentStates,
        part: PrefillPart,
        mixed: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        window, memory = self._prefill_window(states, part, mixed)
        output, _, _ = self._run(window[None], decay[None], beta[None], memory[None])
        if part.checkpoint >= 0:
            states.save(self.state_layer, part.slot, part.checkpoint)
        return output[0]

    def _run(
        self, window: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, memory: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """window [R, kernel - 1 + Q, channels], decay, beta [R, Q, heads]; memory [R, heads, key_dim, value_dim],
        overwritten. Returns outputs [R, Q, heads, value_dim], keys and corrected values [R, heads, Q, ..].
        """
        rows, count = decay.shape[:2]
        convolved = window[:, :count] * self.conv_rows[0]
        for tap in range(1, self.kernel):
            convolved += window[:, tap : tap + count] * self.conv_rows[tap]
        query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in self._heads(self.silu(convolved)))
        decay, beta = (x.transpose(1, 2).flatten(0, 1) for x in (decay, beta))
        output, corrected = token_by_token(query, key, value, decay, beta, memory.flatten(0, 1))
        output = output.view(rows, self.heads, count, self.value_dim).transpose(1, 2)
        return output, key.unflatten(0, (rows, -1)), corrected.unflatten(0, (rows, -1))
