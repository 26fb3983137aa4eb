"""Gated DeltaNet over ragged batches: verify rows and prefill chunks of many slots in one flat step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from modeling.operations import Operations
from modeling.quantized.packed import Weight, stacked_rows
from modeling.ranks import RankGroup
from verifier_service.model.delta_rule import one_block, one_token, unit
from verifier_service.model.recurrent_state import RecurrentStates, Verified
from verifier_service.model.step import PrefillPart, Step, VerifyWindow

ChunkRule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class DeltaNetWeights:
    """One layer's tensors on this rank; names and meanings are transformers'."""

    in_proj_qkv: Weight
    in_proj_z: Weight
    in_proj_b: Weight
    in_proj_a: Weight
    conv1d: torch.Tensor  # [channels, 1, kernel]
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    norm: torch.Tensor
    out_proj: Weight


def split_by_part(
    qkvz: torch.Tensor, ba: torch.Tensor, key_heads: int, key_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Qwen3-Next's projections as Qwen3.5's: in_proj_qkv, in_proj_z, in_proj_b, in_proj_a.

    The rows of qkvz [rows, hidden] and ba [2 x value heads, hidden] go key head by key head: its query and key, then
    the values of its value heads, then their gates; likewise their b, then their a.
    """
    grouped = qkvz.view(key_heads, -1, qkvz.shape[1])
    values = grouped.shape[1] // 2 - key_dim
    query, key, value, gate = (part.flatten(0, 1) for part in grouped.split([key_dim, key_dim, values, values], dim=1))
    beta, decay = ba.view(key_heads, -1, ba.shape[1]).chunk(2, dim=1)
    return torch.cat([query, key, value]), gate, beta.flatten(0, 1), decay.flatten(0, 1)


class RaggedGatedDeltaNet(nn.Module):
    """Replaces transformers' GatedDeltaNet. Reads and writes the states of step.states at index `state_layer`.

    A verify of one token a row commits at once (its outcome is certain); longer ones are kept for the next commit.
    """

    def __init__(
        self,
        weights: DeltaNetWeights,
        *,
        state_layer: int,
        key_dim: int,
        value_dim: int,
        norm_eps: float,
        chunk_rule: ChunkRule,
        ranks: RankGroup,
        operations: Operations,
    ):
        super().__init__()
        self.state_layer, self.key_dim, self.value_dim = state_layer, key_dim, value_dim
        self.norm_eps, self.chunk_rule, self.ranks = norm_eps, chunk_rule, ranks
        self.heads = weights.A_log.shape[0]
        self.channels = weights.in_proj_qkv.shape[0]
        self.key_heads = (self.channels - self.heads * value_dim) // (2 * key_dim)
        # One product for everything that reads the layer's input.
        self.in_proj = operations.linear(
            stacked_rows([weights.in_proj_qkv, weights.in_proj_z, weights.in_proj_b, weights.in_proj_a])
        )
        self.conv = _frozen(weights.conv1d.squeeze(1))  # [channels, kernel]
        self.conv_rows = _frozen(self.conv.t().contiguous())  # [kernel, channels]
        self.kernel = self.conv.shape[1]
        self.negative_rate = _frozen(-weights.A_log.float().exp())
        self.dt_bias = _frozen(weights.dt_bias.float())
        self.silu: Callable[[torch.Tensor], torch.Tensor] = F.silu
        self.norm = _frozen(weights.norm)
        self.out_proj, self.total = operations.partial_linear(weights.out_proj), operations.total

    def forward(self, hidden_states: torch.Tensor, *, step: Step, **_: Any) -> torch.Tensor:
        """[1, tokens, hidden] -> the same, summed over ranks."""
        assert step.states is not None, "a hybrid model needs recurrent states"
        width = self.heads * self.value_dim
        mixed, gate, b, a = self.in_proj(hidden_states[0]).split([self.channels, width, self.heads, self.heads], dim=-1)
        decay, beta = self._gates(a.float(), b.float())
        outputs = []
        if step.verify is not None:
            own = slice(0, step.verify.tokens)
            outputs.append(self._verify(step.states, step.verify, mixed[own], decay[own], beta[own]))
        for part in step.prefill:
            own = slice(part.first, part.stop)
            outputs.append(self._prefill(step.states, part, mixed[own], decay[own], beta[own]))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # [tokens, heads, value_dim]
        output = F.rms_norm(output.to(mixed.dtype), (self.value_dim,), self.norm, self.norm_eps)
        output = output.reshape(-1, width) * self.silu(gate.float()).to(mixed.dtype)
        return self.total(self.out_proj(output), self.ranks)[None]

    def _gates(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a, b [tokens, heads] -> the decay's logarithm and beta, both as `_verify` and `_prefill` want them."""
        return F.softplus(a + self.dt_bias).mul_(self.negative_rate), torch.sigmoid(b)

    def _verify(
        self,
        states: RecurrentStates,
        verify: VerifyWindow,
        mixed: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        run = self._verify_one if verify.longest == 1 else self._verify_block
        return run(states, verify, mixed, decay, beta)

    def _verify_one(
        self,
        states: RecurrentStates,
        verify: VerifyWindow,
        mixed: torch.Tensor,
        log_decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        conv, memory = states.conv[self.state_layer], states.memory[self.state_layer]
        window = self._verify_window(conv, verify, mixed)  # [rows, kernel, channels]
        conv.index_copy_(0, verify.slots, window[:, 1:])
        query, key, value = self._heads(F.silu((window * self.conv_rows).sum(1)))
        output, new = one_token(
            query.reshape(-1, self.key_dim),
            key.reshape(-1, self.key_dim),
            value.reshape(-1, self.value_dim),
            log_decay.reshape(-1),
            beta.reshape(-1),
            memory.index_select(0, verify.slots).view(-1, self.key_dim, self.value_dim),
        )
        memory.index_copy_(0, verify.slots, new.view(verify.rows, *memory.shape[1:]))
        return output.view(-1, self.heads, self.value_dim)

    def _verify_block(
        self,
        states: RecurrentStates,
        verify: VerifyWindow,
        mixed: torch.Tensor,
        log_decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        if verify.gather is not None:
            mixed, log_decay, beta = (x.index_select(0, verify.gather) for x in (mixed, log_decay, beta))
        rows, longest = verify.rows, verify.longest
        window = self._verify_window(states.conv[self.state_layer], verify, mixed)
        convolved = (window.unfold(1, self.kernel, 1) * self.conv).sum(-1)  # [rows, longest, channels]
        query, key, value = self._heads(F.silu(convolved))
        key = key.transpose(1, 2)
        output, decay, corrected = one_block(
            query.transpose(1, 2),
            key,
            value.transpose(1, 2),
            log_decay.reshape(rows, longest, self.heads).transpose(1, 2),
            beta.reshape(rows, longest, self.heads).transpose(1, 2),
            states.memory[self.state_layer].index_select(0, verify.slots),
        )
        states.keep(self.state_layer, Verified(window, key, decay, corrected))
        output = output.transpose(1, 2).reshape(rows * longest, self.heads, self.value_dim)
        return output if verify.scatter is None else output.index_select(0, verify.scatter)

    def _prefill(
        self,
        states: RecurrentStates,
        part: PrefillPart,
        mixed: torch.Tensor,
        log_decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        window, memory = self._prefill_window(states, part, mixed)
        count = mixed.shape[0]
        convolved = window[:count] * self.conv_rows[0]
        for tap in range(1, self.kernel):
            convolved.addcmul_(window[tap : tap + count], self.conv_rows[tap])
        query, key, value = self._split(F.silu(convolved))
        output, final = self.chunk_rule(
            query[None],
            key[None],
            value[None],
            g=log_decay[None],
            beta=beta[None],
            initial_state=memory[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        memory.copy_(final[0])
        if part.checkpoint >= 0:
            states.save(self.state_layer, part.slot, part.checkpoint)
        return output[0].float()

    def _verify_window(self, conv: torch.Tensor, verify: VerifyWindow, mixed: torch.Tensor) -> torch.Tensor:
        """What the convolution reads of a verify, padded: [rows, kernel - 1 + longest, channels]."""
        own = mixed.reshape(verify.rows, verify.longest, self.channels)
        return torch.cat([conv.index_select(0, verify.slots), own], dim=1)

    def _prefill_window(
        self, states: RecurrentStates, part: PrefillPart, mixed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the convolution reads of a chunk [kernel - 1 + tokens, channels], and the memory it goes on from, to be
        overwritten; the convolution's own state is moved on."""
        conv, memory = states.conv[self.state_layer, part.slot], states.memory[self.state_layer, part.slot]
        if part.fresh:
            conv.zero_()
            memory.zero_()
        window = torch.cat([conv, mixed])
        conv.copy_(window[1 - self.kernel :])
        return window, memory

    def _split(self, convolved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[..., channels] -> query, key [..., key_heads, key_dim], value [..., heads, value_dim]."""
        width = self.key_heads * self.key_dim
        query, key, value = convolved.split([width, width, self.heads * self.value_dim], dim=-1)
        return (
            query.unflatten(-1, (self.key_heads, self.key_dim)),
            key.unflatten(-1, (self.key_heads, self.key_dim)),
            value.unflatten(-1, (self.heads, self.value_dim)),
        )

    def _heads(self, convolved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As _split, in float32, query and key normalised (query scaled) and repeated for each value head."""
        convolved = convolved.float()
        keys = 2 * self.key_heads
        both = unit(convolved[..., : keys * self.key_dim].unflatten(-1, (keys, self.key_dim)))
        both = both.repeat_interleave(self.heads // self.key_heads, dim=-2)
        query, key = both.split(self.heads, dim=-2)
        value = convolved[..., keys * self.key_dim :].unflatten(-1, (self.heads, self.value_dim))
        return query * self.key_dim**-0.5, key, value


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
