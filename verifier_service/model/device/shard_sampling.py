"""Tokens taken by all ranks, each in its part of the vocabulary: between them travel a few numbers a row.

Logits are made for rows that something truncates, and for no others. Only a row whose truncation its candidates leave
open (a flat row's top_p) has them gathered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.acceptance.kernel import join, sample
from kernels.truncation.kernel import candidates, truncate_shards
from kernels.truncation.reference import Candidates
from modeling.copies import to_device
from modeling.kernel_head import TritonHead
from modeling.parallel import VocabularyHead
from verifier_service.plan import RowDraw
from verifier_service.sampling.draw import WantedRows, every_row, truncates
from verifier_service.sampling.kernel_draw import draw_by_kernels

CANDIDATES = 256  # of a row and rank


class ShardSampling:
    """head: over kernels. candidates: how many logits of a row each rank tells the others, where anything truncates.
    by_shards: whether truncation may be decided from those; else from whole rows of logits on rank 0.
    """

    def __init__(self, head: VocabularyHead, candidates: int = CANDIDATES, *, by_shards: bool = True):
        assert isinstance(head.multiply, TritonHead), "the head of a model over kernels"
        self._head, self._ranks, self._race = head, head.ranks, head.multiply.race
        self._first = head.ranks.rank * head.share
        self._candidates = min(candidates, head.share)
        self._by_shards = by_shards and head.ranks.size > 1

    def take(self, hidden: torch.Tensor, draws: Sequence[RowDraw]) -> torch.Tensor:
        """hidden [rows, hidden] -> tokens int64 [rows], the same on every rank; -1 where logits are not finite.

        Collective. Waits for a GPU only in a step of several ranks whose candidates may leave a row open: one with a
        top_p, or with a top_k beyond them.
        """
        device = hidden.device
        if not len(hidden):
            return torch.empty(0, dtype=torch.int64, device=device)
        rows = every_row(draws, len(hidden))
        cut = [draw for draw in draws if truncates(draw.params)]
        if not cut:
            return self._raced(hidden, rows)
        may_be_open = any(draw.params.top_p < 1.0 or draw.params.top_k > self._candidates for draw in cut)
        truncated = torch.zeros(len(hidden), dtype=torch.bool)
        for draw in cut:
            truncated[draw.row : draw.row + draw.count] = True
        if bool(truncated.all()):
            return self._drawn(hidden, rows, may_be_open)
        tokens = torch.empty(len(hidden), dtype=torch.int64, device=device)
        for own in (truncated, ~truncated):
            index = own.nonzero()[:, 0]
            there = to_device(index, device)
            part, wanted = hidden.index_select(0, there), rows.at(index)
            taken = self._drawn(part, wanted, may_be_open) if own is truncated else self._raced(part, wanted)
            tokens.index_copy_(0, there, taken)
        return tokens

    def _raced(self, hidden: torch.Tensor, rows: WantedRows) -> torch.Tensor:
        keys, temperature = (to_device(column, hidden.device) for column in (rows.keys, rows.temperature))
        return self._best(*self._race(hidden, keys, temperature, self._first))

    def _drawn(self, hidden: torch.Tensor, rows: WantedRows, may_be_open: bool) -> torch.Tensor:
        logits, rows = self._head.own(hidden), rows.to(hidden.device)
        if not self._by_shards:
            return self._from_whole(logits, rows)
        thresholds, settled = truncate_shards(
            self._everyones_candidates(logits, rows), rows.temperature, rows.top_k.int(), rows.top_p, rows.min_p
        )
        tokens = self._best(
            *sample(logits, rows.keys, rows.temperature, thresholds=thresholds, first_token=self._first)
        )
        if may_be_open and not bool(settled.all()):
            open_rows = (~settled).nonzero()[:, 0]
            tokens[open_rows] = self._from_whole(logits.index_select(0, open_rows), rows.at(open_rows))
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
        if self._ranks.size == 1:
            return tokens
        everyones = torch.stack(self._ranks.gather(torch.stack([tokens, scores.view(torch.int64)])))
        ids, scores = (part.contiguous() for part in everyones.unbind(1))  # aligned, whatever the number of rows
        return join(ids, scores.view(torch.float64))[0]

    def _from_whole(self, logits: torch.Tensor, rows: WantedRows) -> torch.Tensor:
        """Rank 0 takes the tokens of these rows from all of their logits, and tells the others."""
        whole = self._head.whole(logits)
        taken = torch.empty_like(rows.keys) if whole is None else draw_by_kernels(whole, rows)
        self._ranks.broadcast_(taken)
        return taken
