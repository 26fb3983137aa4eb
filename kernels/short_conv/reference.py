"""Short causal convolution over blocks in plain torch. The state is the last width - 1 inputs that are certain."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from kernels.kept_rows import KeptRows, check_kept_rows


def short_conv_verify(
    mixed: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    kept: torch.Tensor,
    rows: KeptRows,
) -> torch.Tensor:
    """silu(convolution) like mixed [tokens, channels], behind the states and what of each slot's last block stands,
    which becomes part of the state; anything for tokens of no row.

    A row's only token is certain, and becomes part of the state too; several tokens are kept. Row r's tokens are
    starts[r] to before starts[r + 1]; slots int [rows], starts int [rows + 1], ascending. A row may be empty: nothing
    happens to its slot. Slots of other rows differ. weight [channels, width], its last tap on the token itself; state
    [slots, width - 1, channels], oldest first; kept [places, channels] like mixed. Each channel by itself, summed in
    float32. Raises ValueError for shapes that do not fit.
    """
    check_arguments(mixed, weight, state, slots, starts[1:])
    check_kept(kept, state)
    check_kept_rows(rows, slots)
    output = torch.zeros_like(mixed)
    for row, (first, stop) in enumerate(pairwise(starts.tolist())):
        if first == stop:
            continue
        slot, at = int(slots[row]), int(rows.first[row])
        _append(state, slot, kept[at : at + int(rows.standing[row])])
        output[first:stop] = _convolved(state[slot], mixed[first:stop], weight)
        if stop - first == 1:
            _append(state, slot, mixed[first:stop])
        else:
            kept[int(rows.into[row]) :][: stop - first] = mixed[first:stop]
    return output


def short_conv_advance(
    mixed: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """As short_conv_verify of rows whose tokens are all certain: they become part of the states."""
    check_arguments(mixed, weight, state, slots, starts[1:])
    output = torch.zeros_like(mixed)
    for slot, (first, stop) in zip(slots.tolist(), pairwise(starts.tolist()), strict=True):
        if stop > first:
            output[first:stop] = _convolved(state[slot], mixed[first:stop], weight)
            _append(state, slot, mixed[first:stop])
    return output


def short_conv_replay(
    kept: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, count: torch.Tensor
) -> None:
    """Advance state[slots[r]] in place by the count[r] inputs from kept[first[r]] on; 0 leaves it as it is.

    first, count int [rows]. Slots differ. Raises ValueError for shapes that do not fit.
    """
    check_kept(kept, state)
    check_rows(slots, first, count)
    for slot, begin, tokens in zip(slots.tolist(), first.tolist(), count.tolist(), strict=True):
        _append(state, slot, kept[begin : begin + tokens])


def _convolved(before: torch.Tensor, mixed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    inputs = torch.cat([before.to(mixed.dtype), mixed]).float()
    return F.silu((inputs.unfold(0, weight.shape[1], 1) * weight.float()).sum(-1)).to(mixed.dtype)


def _append(state: torch.Tensor, slot: int, inputs: torch.Tensor) -> None:
    state[slot] = torch.cat([state[slot], inputs.to(state.dtype)])[len(inputs) :]


def check_arguments(
    mixed: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, by_row: torch.Tensor
) -> None:
    check_kept(mixed, state)
    if weight.shape != (mixed.shape[1], state.shape[1] + 1):
        raise ValueError(f"weight {tuple(weight.shape)} must be [{mixed.shape[1]}, {state.shape[1] + 1}]")
    check_rows(slots, by_row)


def check_kept(inputs: torch.Tensor, state: torch.Tensor) -> None:
    if inputs.dim() != 2 or state.dim() != 3 or state.shape[2] != inputs.shape[1]:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and state {tuple(state.shape)} must be [tokens, channels] and "
            "[slots, width - 1, channels]"
        )


def check_rows(slots: torch.Tensor, *by_row: torch.Tensor) -> None:
    if slots.dim() != 1 or any(part.shape != slots.shape for part in by_row):
        shapes = [tuple(part.shape) for part in by_row]
        raise ValueError(f"slots {tuple(slots.shape)} do not fit what is given by row, {shapes}")
