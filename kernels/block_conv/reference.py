"""The convolution of DFlash 2 in plain torch (method: z-lab/dflash, PyPI dflash 0.1.0, `GroupedDynamicCausalConv`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def convolve_block(x: torch.Tensor, dynamic: torch.Tensor, base: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Each row mixed with the rows before it in its block, channel by channel, like x [rows, channels].

    dynamic [rows, taps, groups]: each row's own weights of itself, of the row before it, ..., one for the channels of a
    group; base [taps, channels] is added to them. places int64 [rows]: of each row in its block, 0 for the first; rows
    of a block stand side by side, and what is before the first does not count. Summed in float32, rounded once. Raises
    ValueError for shapes that do not fit.
    """
    check_arguments(x, dynamic, base, places)
    (rows, channels), (_, taps, groups) = x.shape, dynamic.shape
    own, shared = x.float().view(rows, groups, -1), base.float().view(taps, groups, channels // groups)
    weights = shared + dynamic.float()[..., None]  # [rows, taps, groups, channels of a group]
    mixed = weights[:, 0] * own
    for tap in range(1, min(taps, rows)):
        before = F.pad(own[:-tap], (0, 0, 0, 0, tap, 0)).masked_fill((places < tap)[:, None, None], 0.0)
        mixed = mixed + weights[:, tap] * before
    return mixed.view(rows, channels).to(x.dtype)


def check_arguments(x: torch.Tensor, dynamic: torch.Tensor, base: torch.Tensor, places: torch.Tensor) -> None:
    """Raises ValueError naming what does not fit. Looks at shapes only."""
    if x.dim() != 2 or dynamic.dim() != 3 or len(dynamic) != len(x) or x.shape[1] % dynamic.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)} and dynamic {tuple(dynamic.shape)} must be [rows, channels] and [rows, taps, groups], "
            "groups dividing channels"
        )
    if base.shape != (dynamic.shape[1], x.shape[1]):
        raise ValueError(f"base {tuple(base.shape)} must be [{dynamic.shape[1]}, {x.shape[1]}]")
    if places.shape != x.shape[:1]:
        raise ValueError(f"places {tuple(places.shape)} must be [{len(x)}]")
