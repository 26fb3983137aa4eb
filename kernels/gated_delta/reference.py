"""The gated delta rule over short blocks in plain torch, token by token (arXiv 2412.06464).

S_t = exp(g_t) S_{t-1} + k_t c_t^T,  c_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t),  o_t = S_t^T q_t

What token t writes, its corrected value c_t, does not depend on later tokens. So a verify keeps (k, g, c) of each
token, and whatever prefix stands is replayed from them: by the slot's next verify, which has the state at hand anyway,
or by a replay of its own. The bits are the same however the tokens were cut into blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from kernels.kept_rows import KeptRows, check_kept_rows


class KeptDelta(NamedTuple):
    """What tokens write to the state, float32, by place: key [places, key_heads, key_dim], log_decay [places, heads],
    corrected [places, heads, value_dim].
    """

    key: torch.Tensor
    log_decay: torch.Tensor
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
    kept: KeptDelta,
    rows: KeptRows,
) -> torch.Tensor:
    """Run row r's tokens, starts[r] to before starts[r + 1], from the state memory[slots[r]] and what of its last
    block stands, which becomes part of it. float32 [tokens, heads, value_dim]; anything for tokens of no row.

    A row's only token is certain, and becomes part of the state too; of several tokens it is kept what they write.
    query, key [tokens, key_heads, key_dim], keys of unit length, queries of unit length and scaled; value
    [tokens, heads, value_dim]; log_decay, beta float32 [tokens, heads]; memory float32
    [slots, heads, key_dim, value_dim]; slots int [rows]; starts int [rows + 1], ascending. A row may be empty: nothing
    happens to its slot. Slots of other rows differ. Value head h reads key head h // (heads / key_heads). Raises
    ValueError for shapes that do not fit.
    """
    check_arguments(key, value, memory, slots, starts[1:])
    check_kept(kept, memory)
    check_kept_rows(rows, slots)
    output = torch.zeros(value.shape, device=value.device)
    inputs = query, _for_each_head(key, value), value, log_decay, beta
    for row, (first, stop) in enumerate(pairwise(starts.tolist())):
        if first == stop:
            continue
        slot, at = int(slots[row]), int(rows.first[row])
        memory[slot] = _replayed(memory[slot], kept, range(at, at + int(rows.standing[row])))
        output[first:stop], state, corrected = _run(memory[slot], *(x[first:stop] for x in inputs))
        if stop - first == 1:
            memory[slot] = state
        else:
            own = slice(int(rows.into[row]), int(rows.into[row]) + stop - first)
            kept.key[own], kept.log_decay[own], kept.corrected[own] = key[first:stop], log_decay[first:stop], corrected
    return output


def gated_delta_advance(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> torch.Tensor:
    """As gated_delta_verify of rows whose tokens are all certain: they become part of the states."""
    check_arguments(key, value, memory, slots, starts[1:])
    output = torch.zeros(value.shape, device=value.device)
    inputs = query, _for_each_head(key, value), value, log_decay, beta
    for slot, (first, stop) in zip(slots.tolist(), pairwise(starts.tolist()), strict=True):
        output[first:stop], memory[slot], _ = _run(memory[slot], *(x[first:stop] for x in inputs))
    return output


def gated_delta_replay(
    kept: KeptDelta, memory: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, count: torch.Tensor
) -> None:
    """Advance memory[slots[r]] in place by the count[r] tokens kept from place first[r] on; 0 leaves it as it is.

    first, count int [rows]. Slots differ. Raises ValueError for shapes that do not fit.
    """
    check_kept(kept, memory)
    check_rows(slots, first, count)
    for slot, begin, tokens in zip(slots.tolist(), first.tolist(), count.tolist(), strict=True):
        memory[slot] = _replayed(memory[slot], kept, range(begin, begin + tokens))


def _replayed(state: torch.Tensor, kept: KeptDelta, places: Sequence[int]) -> torch.Tensor:
    key = _for_each_head(kept.key, kept.corrected)
    for at in places:
        state = state * kept.log_decay[at, :, None, None].exp()
        state = state + key[at, :, :, None] * kept.corrected[at, :, None, :]
    return state


def _run(
    state: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one row: outputs, the state behind it, corrected values. key [tokens, heads, key_dim]."""
    query = _for_each_head(query, value)
    output, corrected = (torch.empty(value.shape, device=value.device) for _ in range(2))
    for at in range(len(value)):
        state = state * log_decay[at, :, None, None].exp()
        seen = (state * key[at, :, :, None]).sum(-2)
        corrected[at] = beta[at, :, None] * (value[at].float() - seen)
        state = state + key[at, :, :, None] * corrected[at, :, None, :]
        output[at] = (state * query[at, :, :, None]).sum(-2)
    return output, state, corrected


def _for_each_head(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return keys.float().repeat_interleave(values.shape[1] // keys.shape[1], dim=1)


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
    check_rows(slots, by_row)


def check_kept(kept: KeptDelta, memory: torch.Tensor) -> None:
    heads, key_dim, value_dim = memory.shape[1:]
    places, key_heads = kept.key.shape[:2]
    shapes = (places, key_heads, key_dim), (places, heads), (places, heads, value_dim)
    if heads % key_heads or any(part.shape != shape for part, shape in zip(kept, shapes, strict=True)):
        raise ValueError(
            f"kept {[tuple(part.shape) for part in kept]} does not fit memory {tuple(memory.shape)}: want key, "
            f"log_decay and corrected {list(shapes)}"
        )


def check_rows(slots: torch.Tensor, *by_row: torch.Tensor) -> None:
    if slots.dim() != 1 or any(part.shape != slots.shape for part in by_row):
        shapes = [tuple(part.shape) for part in by_row]
        raise ValueError(f"slots {tuple(slots.shape)} do not fit what is given by row, {shapes}")
