"""From a step's sampled rows to draws, with what changes each request's logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from msgspec import structs

from cluster.contracts import EngineRequest
from verifier_service.flight import SampledRows
from verifier_service.grammar.constraint import Constraint
from verifier_service.grammar.masks import NO_MASKS, Masks
from verifier_service.sampling.draw import Draw
from verifier_service.sampling.edits import Edits, mask_only
from verifier_service.sampling.token_table import TokenTable, has_edits


class Shaping:
    """What changes one request's logits before a token is taken. constraint: by its grammar, if it has one."""

    def __init__(self, request: EngineRequest, constraint: Constraint | None = None):
        # Stop tokens before min_new_tokens are the grammar's masks' to ban: they know where nothing else is left.
        self._request = request if constraint is None else structs.replace(request, min_new_tokens=0)
        self._table: TokenTable | None = None
        self.constraint = constraint

    def edits(self, tokens: Sequence[int], drafts: Sequence[int], allowed: torch.Tensor | None) -> Edits | None:
        """Of a row that follows `tokens` (prompt and output) and of one more after each draft. None: no change.

        allowed: as in Edits.
        """
        if self._table is None:  # only now: a waiting request costs nothing
            self._table = TokenTable(self._request)
        edits = self._table.edits(tokens, drafts)
        if allowed is None:
            return edits
        return replace(edits, allowed=allowed) if edits is not None else mask_only(allowed)


def shaping_of(request: EngineRequest, constraint: Constraint | None = None) -> Shaping | None:
    """None for a request whose logits stay as they are."""
    return Shaping(request, constraint) if constraint is not None or has_edits(request) else None


def draws_of(rows: Sequence[SampledRows], masks: Masks = NO_MASKS) -> list[Draw]:
    """Without those that turn out to be the best token of unchanged logits. masks: of requests with a grammar."""
    draws = []
    for each in rows:
        sequence = each.sequence
        request, shaping = sequence.request, sequence.shaping
        edits = None
        if shaping is not None:
            edits = shaping.edits(sequence.tokens, each.drafts, masks.get(each.row))
        draw = Draw(each.row, each.count, each.position, request.seed, request.choice, request.sampling, edits)
        if edits is not None or not draw.greedy:
            draws.append(draw)
    return draws
