"""The tokens whose logits one request changes: biased, banned as stop tokens, or penalised for having been seen.

Counts grow with the request's tokens, so that a step costs the new tokens and the distinct ones, never the history.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.contracts import EngineRequest, SamplingParams
from verifier_service.sampling.edits import Edits

_PLUS, _COUNT, _PROMPT = range(3)
_SPARE = 64


def has_edits(request: EngineRequest) -> bool:
    """Whether some row's logits change; a grammar is not meant."""
    return bool(request.sampling.logit_bias or _penalises(request.sampling) or _bans(request))


class TokenTable:
    """Of one request, whose tokens only ever grow (a preempted or resumed request's too)."""

    def __init__(self, request: EngineRequest):
        self._params = request.sampling
        self._prompt_tokens = len(request.prompt_ids)
        self._counted = self._prompt_tokens  # tokens of the request that are in the table: generated ids are output
        self._min_new_tokens = request.min_new_tokens if _bans(request) else 0
        self._penalises = _penalises(self._params)
        prompt = request.prompt_ids if self._params.repetition_penalty != 1.0 else ()
        distinct = np.unique(np.asarray(prompt, np.int64))
        self._index = dict(zip(distinct.tolist(), range(len(distinct))))
        self._ids = np.zeros(len(distinct) + _SPARE, np.int64)
        self._ids[: len(distinct)] = distinct
        self._columns = np.zeros((3, len(self._ids)), np.float32)
        self._columns[_PROMPT, : len(distinct)] = 1
        for token, bias in self._params.logit_bias:
            self._add(_PLUS, token, bias)
        self._stops = [self._place(token) for token in request.stop_token_ids] if self._min_new_tokens else []

    def edits(self, tokens: Sequence[int], drafts: Sequence[int]) -> Edits | None:
        """Of a row that follows `tokens` (prompt and output) and of one more after each draft. None: no change."""
        if self._penalises:
            for token in tokens[self._counted :]:
                self._add(_COUNT, token, 1)
            self._counted = len(tokens)
        banned = self._min_new_tokens - (len(tokens) - self._prompt_tokens)
        if not self._penalises and not self._params.logit_bias and banned <= 0:
            return None
        counts = self._counts(drafts)
        size = counts.shape[1]
        plus, _, in_prompt = self._columns[:, :size]
        output = counts > 0
        params = self._params
        minus = params.frequency_penalty * counts + params.presence_penalty * output
        if banned > 0:
            minus[:banned, self._stops] = np.inf
        times = np.where(output | (in_prompt > 0), np.float32(params.repetition_penalty), np.float32(1))
        return Edits(self._ids[:size], plus, times, minus.astype(np.float32, copy=False))

    def _counts(self, drafts: Sequence[int]) -> np.ndarray:
        """float32 [1 + drafts, tokens]: how often each token is in the output before the row."""
        places = [self._place(draft) for draft in drafts] if self._penalises else []
        counts = np.zeros((1 + len(drafts), len(self._index)), np.float32)
        counts[0] = self._columns[_COUNT, : len(self._index)]
        if drafts:
            if places:
                counts[np.arange(1, len(counts)), places] = 1
            np.cumsum(counts, axis=0, out=counts)
        return counts

    def _add(self, column: int, token: int, value: float) -> None:
        place = self._place(token)  # before the columns are read: it may replace them by longer ones
        self._columns[column, place] += value

    def _place(self, token: int) -> int:
        place = self._index.setdefault(token, len(self._index))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._ids[place] = token
        return place


def _penalises(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def _bans(request: EngineRequest) -> bool:
    return request.min_new_tokens > 0 and bool(request.stop_token_ids)
