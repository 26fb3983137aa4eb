"""A proposer that knows the text, for drafts of which a random part stands."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from verifier_service.proposers.plain import NoProposer
from verifier_service.sequence import Progress


class PartlyRight(NoProposer):
    """Drafts of each request's known text, right up to a random point and wrong after it."""

    def __init__(self, texts: Mapping[str, Sequence[int]], vocabulary: int, longest: int = 6, seed: int = 3):
        self._texts, self._vocabulary, self._longest = texts, vocabulary, longest
        self._random = random.Random(seed)
        self._ready: list[Progress] = []

    def resting(self) -> bool:
        return False

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        self._ready = [p for p in progress if p.token_ids and not p.finish]

    def collect(self) -> float:
        for p in self._ready:
            right = self._texts[p.sequence.request.request_id][p.sequence.generated :][: self._longest]
            upto = self._random.randrange(len(right) + 1)
            p.sequence.drafts = tuple(t if i < upto else (t + 1) % self._vocabulary for i, t in enumerate(right))
        return 0.0
