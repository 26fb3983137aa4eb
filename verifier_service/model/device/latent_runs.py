"""In which form the rows of a step attend to latents, and what each form needs to know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from kernels.expanded_attention.batch import ChunkBatch
from kernels.paged_batch import PagedBatch
from verifier_service.model.device.attended import Attended
from verifier_service.model.step import PrefillPart


@dataclass(frozen=True)
class AbsorbedRun:
    """Rows of the step that attend to latents as they lie in the cache."""

    rows: slice
    attended: Attended


@dataclass(frozen=True)
class ExpandedRun:
    """Rows of the step, whole chunks, that attend to keys and values made of latents. tables: their chunks' block
    tables, int32 [chunks, max_blocks]; places: tokens of all their contexts.
    """

    rows: slice
    batch: ChunkBatch
    tables: torch.Tensor
    places: int


LatentRuns = tuple[AbsorbedRun | ExpandedRun, ...]


def latent_runs(
    batch: PagedBatch,
    verify: int,
    prefill: tuple[PrefillPart, ...],
    expands: Callable[[int, int], bool],
    attended: Callable[[PagedBatch, int], Attended],
) -> LatentRuns:
    """Of a step of `verify` verify rows, which stay absorbed, and then chunks. () where no chunk expands.

    expands: whether so many rows of one request over so many tokens do. attended: how so many absorbed rows attend.
    Waits for nothing.
    """
    forms = [False] * verify + [expands(part.stop - part.first, part.context) for part in prefill]
    if not any(forms):
        return ()
    runs: list[AbsorbedRun | ExpandedRun] = []
    first = 0
    for expand, members in groupby(range(len(forms)), forms.__getitem__):
        requests = list(members)
        own = slice(requests[0], requests[-1] + 1)
        parts = prefill[max(0, own.start - verify) : max(0, own.stop - verify)]
        rows = slice(first, parts[-1].stop if parts else prefill[0].first)
        # In memory of their own, for kernels are compiled for aligned addresses.
        starts = batch.query_starts[own.start : own.stop + 1] - first
        tables, contexts = batch.block_tables[own].clone(), batch.context_lengths[own].clone()
        if expand:
            bounds = F.pad(contexts.cumsum(0, dtype=torch.int32), (1, 0))
            runs.append(ExpandedRun(rows, ChunkBatch(starts, bounds), tables, sum(part.context for part in parts)))
        else:
            seen = PagedBatch(tables, starts, contexts, batch.longest_context)
            runs.append(AbsorbedRun(rows, attended(seen, rows.stop - rows.start)))
        first = rows.stop
    return tuple(runs)
