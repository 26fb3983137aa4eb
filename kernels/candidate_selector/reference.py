"""The candidate selector of DFlash 2 in plain torch (method: z-lab/dflash, PyPI dflash 0.1.0, `CandidateSelector`)."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Path(NamedTuple):
    """token_ids int64 [rows]; confidence float32 [rows]: softmax of the token's score among its row's candidates."""

    token_ids: torch.Tensor
    confidence: torch.Tensor


def select_path(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    starts: torch.Tensor,
    predecessors: torch.Tensor,
    successors: torch.Tensor,
) -> Path:
    """The best candidate of each row, given the one chosen before it; the first of equals.

    candidates int64 [rows, k] and their logits float32 [rows, k]; hidden [rows, rank], the rows' projections; anchors
    int64 [blocks]: the bonus token in front of each block's rows; starts int64 [blocks + 1], ascending from 0: block b
    owns the rows from starts[b] to before starts[b + 1]; predecessors, successors [vocabulary, rank]: the codebooks.
    A candidate c behind token p scores logit(c) + sum(predecessors[p] * hidden * successors[c]), in float32. Rows from
    starts[-1] on are padding. Raises ValueError for shapes that do not fit.
    """
    check_arguments(candidates, logits, hidden, anchors, starts, predecessors, successors)
    path = Path(torch.zeros_like(candidates[:, 0]), torch.zeros_like(logits[:, 0]))
    for block, previous in enumerate(anchors.tolist()):
        for row in range(int(starts[block]), int(starts[block + 1])):
            wanted = predecessors[previous].float() * hidden[row].float()
            scores = logits[row] + successors[candidates[row]].float() @ wanted
            best = int((scores == scores.amax()).nonzero()[0])
            previous = int(candidates[row, best])
            path.token_ids[row] = previous
            path.confidence[row] = scores.softmax(-1)[best]
    return path


def check_arguments(
    candidates: torch.Tensor,
    logits: torch.Tensor,
    hidden: torch.Tensor,
    anchors: torch.Tensor,
    starts: torch.Tensor,
    predecessors: torch.Tensor,
    successors: torch.Tensor,
) -> None:
    """Raises ValueError naming what does not fit. Looks at shapes only, never at contents."""
    if candidates.dim() != 2 or candidates.shape != logits.shape:
        raise ValueError(f"candidates {tuple(candidates.shape)} and logits {tuple(logits.shape)} must be [rows, k]")
    if hidden.dim() != 2 or len(hidden) != len(candidates):
        raise ValueError(f"hidden {tuple(hidden.shape)} must be [{len(candidates)}, rank]")
    if predecessors.shape != successors.shape or predecessors.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"predecessors {tuple(predecessors.shape)} and successors {tuple(successors.shape)} must be "
            f"[vocabulary, {hidden.shape[1]}]"
        )
    if starts.shape != (len(anchors) + 1,):
        raise ValueError(f"starts {tuple(starts.shape)} must be [{len(anchors) + 1}] for {len(anchors)} anchors")
