"""Tokens taken by all ranks, each in its part of the vocabulary: between them travel a few numbers a row.

Only a row whose truncation its candidates leave open (a flat row's top_p) has its logits gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.acceptance.kernel import join, sample
from kernels.truncation.kernel import candidates, truncate_shards
from kernels.truncation.reference import Candidates
from modeling.parallel import VocabularyHead
from verifier_service.plan import RowDraw
from verifier_service.sampling.draw import WantedRows, every_row
from verifier_service.sampling.kernel_draw import draw_by_kernels

CANDIDATES = 256  # of a row and rank


class ShardSampling:
    """candidates: how many logits of a row each rank tells the others, where anything truncates."""

    def __init__(self, head: VocabularyHead, candidates: int = CANDIDATES):
        self._head, self._ranks = head, head.ranks
        self._candidates = min(candidates, head.share)

    def take(self, hidden: torch.Tensor, draws: Sequence[RowDraw]) -> torch.Tensor:
        """hidden [rows, hidden] -> tokens int64 [rows], the same on every rank; -1 where logits are not finite.

        Collective. Waits for a GPU only in a step whose candidates may leave a row open: one with a top_p, or with a
        top_k beyond them.
        """
        if not len(hidden):
            return torch.empty(0, dtype=torch.int64, device=hidden.device)
        logits = self._head.own(hidden)
        rows = every_row(draws, len(hidden), hidden.device)
        thresholds = settled = None
        if rows.truncated:
            thresholds, settled = truncate_shards(
                self._everyones_candidates(logits, rows), rows.temperature, rows.top_k.int(), rows.top_p, rows.min_p
            )
        first = self._ranks.rank * self._head.share
        tokens = self._best(*sample(logits, rows.keys, rows.temperature, thresholds=thresholds, first_token=first))
        if settled is not None and self._may_be_open(draws) and not bool(settled.all()):
            self._take_from_whole(tokens, logits, rows, (~settled).nonzero()[:, 0])
        return tokens

    def _everyones_candidates(self, logits: torch.Tensor, rows: WantedRows) -> Candidates:
        """[ranks, rows, ...], all in one gather."""
        own = candidates(logits, rows.temperature, self._candidates)
        mass = own.mass[:, None].view(torch.float32)  # two halves
        packed = torch.cat([own.values, own.bound[:, None], own.peak[:, None], mass], dim=1)
        values, bound, peak, mass = torch.stack(self._ranks.gather(packed)).split([own.values.shape[1], 1, 1, 2], dim=2)
        whole = mass.contiguous().view(torch.float64)[..., 0]
        return Candidates(values.contiguous(), bound[..., 0], peak[..., 0], whole)

    def _best(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Of all ranks' (token, score) of each row, in one gather."""
        everyones = torch.stack(self._ranks.gather(torch.stack([tokens, scores.view(torch.int64)])))
        ids, scores = (part.contiguous() for part in everyones.unbind(1))  # aligned, whatever the number of rows
        return join(ids, scores.view(torch.float64))[0]

    def _may_be_open(self, draws: Sequence[RowDraw]) -> bool:
        return any(draw.params.top_p < 1.0 or draw.params.top_k > self._candidates for draw in draws)

    def _take_from_whole(
        self, tokens: torch.Tensor, logits: torch.Tensor, rows: WantedRows, index: torch.Tensor
    ) -> None:
        """Rank 0 takes the tokens of these rows from all of their logits, and tells the others. In place."""
        whole = self._head.whole(logits.index_select(0, index))
        taken = torch.empty_like(index) if whole is None else draw_by_kernels(whole, rows.at(index))
        self._ranks.broadcast_(taken)
        tokens[index] = taken
