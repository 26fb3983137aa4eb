"""Where a verify keeps what its tokens bring to a recurrent state, until it is known how many of them stand."""

from __future__ import annotations

from typing import NamedTuple

import torch


class KeptRows(NamedTuple):
    """All int32 [rows], of rows that begin and end with `starts` of a launch. Row r's slot: `standing[r]` tokens kept
    from place `first[r]` on stand, and are not in its state yet. What the row itself keeps goes to the places from
    `into[r]` on, of which none is read in the same launch; a row of one token keeps nothing.
    """

    first: torch.Tensor
    standing: torch.Tensor
    into: torch.Tensor


def check_kept_rows(rows: KeptRows, slots: torch.Tensor) -> None:
    """Raises ValueError for shapes that do not fit."""
    if any(part.shape != slots.shape for part in rows):
        raise ValueError(f"kept rows {[tuple(part.shape) for part in rows]} do not fit slots {tuple(slots.shape)}")
