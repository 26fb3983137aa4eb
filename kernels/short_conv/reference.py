"""Short causal convolution over a block in plain torch. The state is the last width - 1 inputs that are committed."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F


def short_conv_verify(
    mixed: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """silu(convolution) like mixed [tokens, channels]; anything for tokens of no row. The state is not written.

    Row r's tokens are starts[r] to before starts[r + 1]; slots int [rows], starts int [rows + 1], ascending: a row may
    be empty. weight [channels, width], its last tap on the token itself; state [slots, width - 1, channels], oldest
    first. Each channel by itself, summed in float32. Raises ValueError for shapes that do not fit.
    """
    check_arguments(mixed, state, slots, starts[1:])
    if weight.shape != (mixed.shape[1], state.shape[1] + 1):
        raise ValueError(f"weight {tuple(weight.shape)} must be [{mixed.shape[1]}, {state.shape[1] + 1}]")
    output = torch.zeros_like(mixed)
    for slot, (first, stop) in zip(slots.tolist(), pairwise(starts.tolist()), strict=True):
        inputs = torch.cat([state[slot].to(mixed.dtype), mixed[first:stop]]).float()
        if stop > first:
            convolved = (inputs.unfold(0, weight.shape[1], 1) * weight.float()).sum(-1)
            output[first:stop] = F.silu(convolved).to(mixed.dtype)
    return output


def short_conv_commit(
    mixed: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, first: torch.Tensor, kept: torch.Tensor
) -> None:
    """Advance state[slots[r]] in place by the kept[r] tokens from first[r] on; 0 leaves it as it is. Slots differ.

    mixed as given to the verify; first, kept int [rows]. Raises ValueError for shapes that do not fit.
    """
    check_arguments(mixed, state, slots, first)
    check_arguments(mixed, state, slots, kept)
    for slot, begin, count in zip(slots.tolist(), first.tolist(), kept.tolist(), strict=True):
        inputs = torch.cat([state[slot], mixed[begin : begin + count].to(state.dtype)])
        state[slot] = inputs[count:]


def check_arguments(mixed: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, by_row: torch.Tensor) -> None:
    if mixed.dim() != 2 or state.dim() != 3 or state.shape[2] != mixed.shape[1]:
        raise ValueError(
            f"mixed {tuple(mixed.shape)} and state {tuple(state.shape)} must be [tokens, channels] and "
            "[slots, width - 1, channels]"
        )
    if slots.dim() != 1 or by_row.shape != slots.shape:
        raise ValueError(f"slots {tuple(slots.shape)} do not fit what is given by row, {tuple(by_row.shape)}")
