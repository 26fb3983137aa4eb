"""The gated delta rule over short blocks in plain torch, token by token (arXiv 2412.06464).

S_t = exp(g_t) S_{t-1} + k_t c_t^T,  c_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),  o_t = S_t^T q_t

What token t writes, its corrected value c_t, does not depend on later tokens. So a verify leaves the committed state
alone and keeps (k, running decay, c); any prefix of the block is committed from them by one weighted sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class BlockOutcome(NamedTuple):
    """All float32. output, corrected [rows, heads, longest, value_dim]; decay [rows, heads, longest]: the log decays,
    summed up. Cells from a row's length on are zero.
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
    lengths: torch.Tensor,
) -> BlockOutcome:
    """Run row r's first lengths[r] tokens from the state memory[slots[r]], which is read and not written.

    query, key [rows, key_heads, longest, key_dim], keys of unit length, queries of unit length and scaled; value
    [rows, heads, longest, value_dim]; log_decay, beta float32 [rows, heads, longest]; memory float32
    [slots, heads, key_dim, value_dim]; slots, lengths int [rows]. Value head h reads key head h // (heads / key_heads).
    Raises ValueError for shapes that do not fit.
    """
    check_arguments(key, value, memory, slots, lengths)
    rows, heads, longest, _ = value.shape
    group = heads // key.shape[1]
    query, key = (x.float().repeat_interleave(group, dim=1) for x in (query, key))
    state = memory[slots.long()].clone()
    output, corrected = (torch.zeros(value.shape, device=value.device) for _ in range(2))
    decay = torch.zeros(rows, heads, longest, device=value.device)
    for at in range(longest):
        live = (lengths > at)[:, None].to(value.device)
        state = state * log_decay[:, :, at, None, None].masked_fill(~live[..., None, None], 0.0).exp()
        seen = (state * key[:, :, at, :, None]).sum(-2)
        fix = (beta[:, :, at, None] * (value[:, :, at].float() - seen)).masked_fill(~live[..., None], 0.0)
        state = state + key[:, :, at, :, None].masked_fill(~live[..., None, None], 0.0) * fix[..., None, :]
        corrected[:, :, at] = fix
        output[:, :, at] = (state * query[:, :, at, :, None]).sum(-2).masked_fill(~live[..., None], 0.0)
        before = decay[:, :, at - 1] if at else 0.0
        decay[:, :, at] = (before + log_decay[:, :, at]).masked_fill(~live, 0.0)
    return BlockOutcome(output, decay, corrected)


def gated_delta_commit(
    key: torch.Tensor,
    decay: torch.Tensor,
    corrected: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    """Advance memory[slots[r]] in place by row r's first kept[r] tokens; 0 leaves it as it is. Slots differ.

    key [rows, key_heads, longest, key_dim] as given to the verify, decay and corrected as it returned them.
    Raises ValueError for shapes that do not fit.
    """
    check_arguments(key, corrected, memory, slots, kept)
    heads, longest = decay.shape[1:]
    key = key.float().repeat_interleave(heads // key.shape[1], dim=1)
    last = (kept.long() - 1).clamp(min=0).view(-1, 1, 1).expand(-1, heads, 1)
    total = decay.gather(-1, last).masked_fill((kept == 0).view(-1, 1, 1), 0.0)  # [rows, heads, 1]
    beyond = torch.arange(longest, device=kept.device) >= kept[:, None]
    weight = (total - decay).masked_fill(beyond[:, None], float("-inf")).exp()
    written = (key * weight[..., None]).masked_fill(beyond[:, None, :, None], 0.0).transpose(-1, -2) @ corrected
    memory[slots.long()] = memory[slots.long()] * total.exp()[..., None] + written


def check_arguments(
    key: torch.Tensor, value: torch.Tensor, memory: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor
) -> None:
    rows, heads, longest, value_dim = value.shape
    if key.shape[0] != rows or key.shape[2] != longest or heads % key.shape[1]:
        raise ValueError(
            f"key {tuple(key.shape)} does not fit value {tuple(value.shape)}: want [{rows}, key_heads, {longest}, "
            f"key_dim] with key_heads a divisor of {heads}"
        )
    if memory.dtype != torch.float32 or memory.shape[1:] != (heads, key.shape[3], value_dim):
        raise ValueError(
            f"memory {tuple(memory.shape)} {memory.dtype} must be float32 [slots, {heads}, {key.shape[3]}, {value_dim}]"
        )
    if slots.shape != (rows,) or lengths.shape != (rows,):
        raise ValueError(f"slots {tuple(slots.shape)} and lengths {tuple(lengths.shape)} must be [{rows}], one a row")
