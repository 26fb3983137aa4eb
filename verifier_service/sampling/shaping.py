"""From a step's sampled rows to draws, with what changes each request's logits."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.contracts import EngineRequest
from verifier_service.sampling.draw import Draw
from verifier_service.sampling.edits import Edits
from verifier_service.sampling.token_table import TokenTable, has_edits
from verifier_service.scheduler import SampledRows


class Shaping:
    """What changes one request's logits before a token is taken."""

    def __init__(self, request: EngineRequest):
        self._request = request
        self._table: TokenTable | None = None

    def edits(self, tokens: Sequence[int], drafts: Sequence[int]) -> Edits | None:
        """Of a row that follows `tokens` (prompt and output) and of one more after each draft. None: no change."""
        if self._table is None:  # only now: a waiting request costs nothing
            self._table = TokenTable(self._request)
        return self._table.edits(tokens, drafts)


def shaping_of(request: EngineRequest) -> Shaping | None:
    """None for a request whose logits stay as they are."""
    return Shaping(request) if has_edits(request) else None


def draws_of(rows: Sequence[SampledRows]) -> list[Draw]:
    """Without those that turn out to be the best token of unchanged logits."""
    draws = []
    for each in rows:
        sequence = each.sequence
        request, shaping = sequence.request, sequence.shaping
        edits = shaping.edits(sequence.tokens, each.drafts) if shaping is not None else None
        draw = Draw(each.row, each.count, each.position, request.seed, request.choice, request.sampling, edits)
        if edits is not None or not draw.greedy:
            draws.append(draw)
    return draws
