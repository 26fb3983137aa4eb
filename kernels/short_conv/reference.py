"""Short causal convolution over a block in plain torch. The state is the last width - 1 inputs that are committed."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def short_conv_verify(
    mixed: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """silu(convolution) like mixed [rows, longest, channels]; zero from lengths[r] on. The state is not written.

    weight [channels, width], its last tap on the token itself; state [slots, width - 1, channels], oldest first; slots,
    lengths int [rows]. Each channel by itself, summed in float32. Raises ValueError for shapes that do not fit.
    """
    check_arguments(mixed, state, slots, lengths)
    if weight.shape != (mixed.shape[2], state.shape[1] + 1):
        raise ValueError(f"weight {tuple(weight.shape)} must be [{mixed.shape[2]}, {state.shape[1] + 1}]")
    inputs = torch.cat([state[slots.long()].to(mixed.dtype), mixed], dim=1).float()
    convolved = (inputs.unfold(1, weight.shape[1], 1) * weight.float()).sum(-1)
    padding = torch.arange(mixed.shape[1], device=mixed.device) >= lengths[:, None]
    return F.silu(convolved).masked_fill(padding[..., None], 0.0).to(mixed.dtype)


def short_conv_commit(mixed: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, kept: torch.Tensor) -> None:
    """Advance state[slots[r]] in place by row r's first kept[r] tokens; 0 leaves it as it is. Slots differ.

    mixed as given to the verify. Raises ValueError for shapes that do not fit.
    """
    check_arguments(mixed, state, slots, kept)
    inputs = torch.cat([state[slots.long()], mixed.to(state.dtype)], dim=1)
    at = kept.long()[:, None] + torch.arange(state.shape[1], device=mixed.device)
    state[slots.long()] = inputs[torch.arange(mixed.shape[0], device=mixed.device)[:, None], at]


def check_arguments(mixed: torch.Tensor, state: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor) -> None:
    rows = mixed.shape[0]
    if mixed.dim() != 3 or state.dim() != 3 or state.shape[2] != mixed.shape[2]:
        raise ValueError(
            f"mixed {tuple(mixed.shape)} and state {tuple(state.shape)} must be [rows, longest, channels] and "
            "[slots, width - 1, channels]"
        )
    if slots.shape != (rows,) or lengths.shape != (rows,):
        raise ValueError(f"slots {tuple(slots.shape)} and lengths {tuple(lengths.shape)} must be [{rows}], one a row")
