"""Attention of a step's rows: in one launch, or where contexts are cut into sections, of so many rows at a time.

Partial sums take memory for each row and section, and what is measured at the start is a step over short contexts: so
that steps of any size may be cut into sections, their rows are taken in pieces. A row's bits do not depend on pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.paged_batch import PagedBatch

Attend = Callable[[torch.Tensor, PagedBatch], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a step, and what they attend to."""

    rows: slice
    batch: PagedBatch


@dataclass(frozen=True)
class Attended:
    """section: context tokens that are added up in one piece, None = as it is fastest."""

    pieces: tuple[Piece, ...]
    section: int | None

    def over(self, query: torch.Tensor, attend: Attend) -> torch.Tensor:
        """query [rows, ...] -> what `attend` makes of it."""
        made = [attend(query[piece.rows], piece.batch) for piece in self.pieces]
        return made[0] if len(made) == 1 else torch.cat(made)


def attended(batch: PagedBatch, rows: int, section: int | None, most: int) -> Attended:
    """most: rows of a piece, if there are sections. Waits for nothing."""
    if section is None or rows <= most:
        return Attended((Piece(slice(0, rows), batch),), section)
    return Attended(tuple(_piece(batch, first, min(first + most, rows)) for first in range(0, rows, most)), section)


def _piece(batch: PagedBatch, first: int, stop: int) -> Piece:
    """A request that goes on behind the piece ends at its last row; one without rows in it has none."""
    starts, behind = batch.query_starts, (batch.query_starts[1:] - stop).clamp_(min=0)
    own = PagedBatch(
        batch.block_tables, starts.clamp(first, stop).sub_(first), batch.context_lengths - behind, batch.longest_context
    )
    return Piece(slice(first, stop), own)
