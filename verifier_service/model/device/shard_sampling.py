"""Tokens taken by all ranks, each in its part of the vocabulary: between them travel a few numbers a row.

Logits are made for rows that something truncates, and for no others. They are gathered only where a top_k is larger
than what a rank tells of its own; a row whose top_p reaches beyond that (a flat one's) is settled by all together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kernels.acceptance.kernel import join, sample
from kernels.truncation.kernel import candidates, settle_shards, truncate_shards
from kernels.truncation.reference import Candidates
from modeling.copies import to_device
from modeling.kernel_head import TritonHead
from modeling.parallel import VocabularyHead
from verifier_service.plan import RowDraw, ShownRows
from verifier_service.sampling.draw import WantedRows, every_row, truncates
from verifier_service.sampling.kernel_draw import draw_by_kernels

CANDIDATES = 256  # of a row and rank

Way = Callable[[torch.Tensor, WantedRows], torch.Tensor]  # hidden states and how their rows are sampled -> tokens


class ShardSampling:
    """head: over kernels. candidates: how many logits of a row each rank tells the others, where anything truncates.
    by_shards: whether truncation may be decided from those; else from whole rows of logits on rank 0.
    """

    def __init__(self, head: VocabularyHead, candidates: int = CANDIDATES, *, by_shards: bool = True):
        assert isinstance(head.multiply, TritonHead), "the head of a model over kernels"
        self._head, self._ranks, self._race = head, head.ranks, head.multiply.race
        self._first = head.ranks.rank * head.share
        self._candidates = min(candidates, head.share)
        self._shares = by_shards and head.ranks.size > 1

    def take(self, hidden: torch.Tensor, draws: Sequence[RowDraw], others: Sequence[ShownRows] = ()) -> torch.Tensor:
        """hidden [rows, hidden] -> tokens int64 [rows], the same on every rank; -1 where logits are not finite, and 0
        in rows that are `others` to take.

        Collective; does not wait for a GPU.
        """
        device, count = hidden.device, len(hidden)
        if not count:
            return torch.empty(0, dtype=torch.int64, device=device)
        rows = every_row(draws, count)
        ways: dict[Way, list[int]] = {}
        for draw in draws:
            if truncates(draw.params):
                ways.setdefault(self._way(draw), []).extend(range(draw.row, draw.row + draw.count))
        if not ways and not others:
            return self._raced(hidden, rows)
        plain = set(range(count)).difference(*(each.rows for each in others), *ways.values())
        if plain:
            ways[self._raced] = sorted(plain)
        if len(ways) == 1 and not others:
            (way,) = ways
            return way(hidden, rows)
        tokens = torch.zeros(count, dtype=torch.int64, device=device)
        for way, own in ways.items():
            index = torch.tensor(own)
            there = to_device(index, device)
            tokens.index_copy_(0, there, way(hidden.index_select(0, there), rows.at(index)))
        return tokens

    def _way(self, draw: RowDraw) -> Way:
        return self._by_shards if self._shares and draw.params.top_k <= self._candidates else self._from_whole

    def _raced(self, hidden: torch.Tensor, rows: WantedRows) -> torch.Tensor:
        keys, temperature = (to_device(column, hidden.device) for column in (rows.keys, rows.temperature))
        return self._best(*self._race(hidden, keys, temperature, self._first))

    def _by_shards(self, hidden: torch.Tensor, rows: WantedRows) -> torch.Tensor:
        may_be_open = bool((rows.top_p < 1.0).any())
        logits, rows = self._head.own(hidden), rows.to(hidden.device)
        wanted = rows.temperature, rows.top_k.int(), rows.top_p, rows.min_p
        shards = self._everyones_candidates(logits, rows)
        thresholds, settled = truncate_shards(shards, *wanted)
        if may_be_open:
            settle_shards(logits, shards, thresholds, settled, *wanted, self._everyones)
        return self._best(*sample(logits, rows.keys, rows.temperature, thresholds=thresholds, first_token=self._first))

    def _from_whole(self, hidden: torch.Tensor, rows: WantedRows) -> torch.Tensor:
        """Rank 0 takes the tokens of these rows from all of their logits, and tells the others."""
        whole, rows = self._head(hidden), rows.to(hidden.device)
        taken = torch.empty_like(rows.keys) if whole is None else draw_by_kernels(whole, rows)
        self._ranks.broadcast_(taken)
        return taken

    def _everyones_candidates(self, logits: torch.Tensor, rows: WantedRows) -> Candidates:
        """[ranks, rows, ...], all in one gather."""
        own = candidates(logits, rows.temperature, self._candidates)
        mass = own.mass[:, None].view(torch.float32)  # two halves
        packed = torch.cat([own.values, own.bound[:, None], own.peak[:, None], mass], dim=1)
        values, bound, peak, mass = self._everyones(packed).split([own.values.shape[1], 1, 1, 2], dim=2)
        whole = mass.contiguous().view(torch.float64)[..., 0]
        return Candidates(values.contiguous(), bound[..., 0], peak[..., 0], whole)

    def _best(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Of all ranks' (token, score) of each row, in one gather."""
        if self._ranks.size == 1:
            return tokens
        everyones = self._everyones(torch.stack([tokens, scores.view(torch.int64)]))
        ids, scores = (part.contiguous() for part in everyones.unbind(1))  # aligned, whatever the number of rows
        return join(ids, scores.view(torch.float64))[0]

    def _everyones(self, own: torch.Tensor) -> torch.Tensor:
        """[ranks, ...]."""
        return torch.stack(self._ranks.gather(own))
