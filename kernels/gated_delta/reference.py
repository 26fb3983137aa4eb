"""The gated delta rule over short blocks in plain torch, token by token (arXiv 2412.06464).

S_t = exp(g_t) S_{t-1} + k_t c_t^T,  c_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),  o_t = S_t^T q_t

What token t writes, its corrected value c_t, does not depend on later tokens. So a verify leaves the committed state
alone and keeps (k, running decay, c); any prefix of the block is committed from them by one weighted sum. A replay
runs S_t again instead, which gives the same bits however the tokens were cut into blocks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch


class BlockOutcome(NamedTuple):
    """All float32. output, corrected [tokens, heads, value_dim]; decay [tokens, heads]: the log decays, summed up from
    the row's first token. Of tokens that belong to no row: anything.
    """

    output: torch.Tensor
    decay: torch.Tensor
    corrected: torch.Tensor


def gated_delta_verify(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> BlockOutcome:
    """Run row r's tokens, starts[r] to before starts[r + 1], from the state memory[slots[r]], which is not written.

    query, key [tokens, key_heads, key_dim], keys of unit length, queries of unit length and scaled; value
    [tokens, heads, value_dim]; log_decay, beta float32 [tokens, heads]; memory float32
    [slots, heads, key_dim, value_dim]; slots int [rows]; starts int [rows + 1], ascending: a row may be empty. Value
    head h reads key head h // (heads / key_heads). Raises ValueError for shapes that do not fit.
    """
    check_arguments(key, value, memory, slots, starts[1:])
    group = value.shape[1] // key.shape[1]
    query, key = (x.float().repeat_interleave(group, dim=1) for x in (query, key))
    output, corrected = (torch.zeros(value.shape, device=value.device) for _ in range(2))
    decay = torch.zeros(log_decay.shape, device=value.device)
    for slot, (first, stop) in zip(slots.tolist(), pairwise(starts.tolist()), strict=True):
        state, total = memory[slot].clone(), torch.zeros_like(decay[0])
        for at in range(first, stop):
            state = state * log_decay[at, :, None, None].exp()
            seen = (state * key[at, :, :, None]).sum(-2)
            corrected[at] = beta[at, :, None] * (value[at].float() - seen)
            state = state + key[at, :, :, None] * corrected[at, :, None, :]
            output[at] = (state * query[at, :, :, None]).sum(-2)
            total = total + log_decay[at]
            decay[at] = total
    return BlockOutcome(output, decay, corrected)


def gated_delta_commit(
    key: torch.Tensor,
    decay: torch.Tensor,
    corrected: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """Advance memory[slots[r]] in place by the kept[r] tokens from first[r] on; 0 leaves it as it is. Slots differ.

    key [tokens, key_heads, key_dim] as given to the verify, decay and corrected as it returned them; first, kept int
    [rows]. Raises ValueError for shapes that do not fit.
    """
    check_arguments(key, corrected, memory, slots, first)
    check_arguments(key, corrected, memory, slots, kept)
    key = key.float().repeat_interleave(corrected.shape[1] // key.shape[1], dim=1)
    for slot, begin, count in zip(slots.tolist(), first.tolist(), kept.tolist(), strict=True):
        if count:
            own = slice(begin, begin + count)
            total = decay[begin + count - 1]  # [heads]
            weighted = key[own] * (total - decay[own]).exp()[..., None]  # [count, heads, key_dim]
            memory[slot] = memory[slot] * total.exp()[:, None, None] + weighted.permute(1, 2, 0) @ corrected[
                own
            ].transpose(0, 1)


def gated_delta_replay(
    key: torch.Tensor,
    log_decay: torch.Tensor,
    corrected: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    first: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """As gated_delta_commit, token by token; log_decay [tokens, heads] as given to the verify."""
    check_arguments(key, corrected, memory, slots, first)
    check_arguments(key, corrected, memory, slots, kept)
    key = key.float().repeat_interleave(corrected.shape[1] // key.shape[1], dim=1)
    for slot, begin, count in zip(slots.tolist(), first.tolist(), kept.tolist(), strict=True):
        for at in range(begin, begin + count):
            faded = memory[slot] * log_decay[at, :, None, None].exp()
            memory[slot] = faded + key[at, :, :, None] * corrected[at, :, None, :]


def check_arguments(
    key: torch.Tensor, value: torch.Tensor, memory: torch.Tensor, slots: torch.Tensor, by_row: torch.Tensor
) -> None:
    tokens, heads, value_dim = value.shape
    if key.dim() != 3 or key.shape[0] != tokens or heads % key.shape[1]:
        raise ValueError(
            f"key {tuple(key.shape)} does not fit value {tuple(value.shape)}: want [{tokens}, key_heads, key_dim] with "
            f"key_heads a divisor of {heads}"
        )
    if memory.dtype != torch.float32 or memory.shape[1:] != (heads, key.shape[2], value_dim):
        raise ValueError(
            f"memory {tuple(memory.shape)} {memory.dtype} must be float32 [slots, {heads}, {key.shape[2]}, {value_dim}]"
        )
    if slots.dim() != 1 or by_row.shape != slots.shape:
        raise ValueError(f"slots {tuple(slots.shape)} do not fit what is given by row, {tuple(by_row.shape)}")
