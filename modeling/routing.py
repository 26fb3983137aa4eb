"""Which experts see a token, and with what weights: one small callable per way of routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# float32 logits [tokens, experts] -> weights and chosen experts, both [tokens, top_k]
Route = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class SoftmaxTopK:
    """The best of the softmax over all experts (Qwen3-MoE, Qwen3.5-MoE).

    normalized: the chosen probabilities are scaled to add up to one.
    """

    top_k: int
    normalized: bool

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 logits [tokens, experts] -> weights and chosen experts, both [tokens, top_k]."""
        if self.normalized:  # a softmax over the chosen ones is the whole softmax scaled to add up to one
            best, chosen = torch.topk(logits, self.top_k, dim=-1)
            return torch.softmax(best, dim=-1), chosen
        weights, chosen = torch.topk(torch.softmax(logits, dim=-1), self.top_k, dim=-1)
        return weights, chosen


@dataclass(frozen=True)
class SigmoidTopK:
    """Independent sigmoid scores; a learned correction decides who is chosen but not how much it weighs (DeepSeek-V3).

    correction: float32 [experts]. groups: experts are divided into so many runs, and only those of the `best_groups`
    with the highest sum of their two best corrected scores can be chosen. normalized: the chosen scores are divided by
    their sum. scale: factor of all weights. sigmoid: how it is computed.
    """

    correction: torch.Tensor
    top_k: int
    groups: int
    best_groups: int
    normalized: bool
    scale: float
    sigmoid: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 logits [tokens, experts] -> weights and chosen experts, both [tokens, top_k]."""
        scores = self.sigmoid(logits)
        corrected = scores + self.correction
        if self.best_groups < self.groups:
            corrected = self._only_best_groups(corrected)
        chosen = torch.topk(corrected, self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, chosen

    def _only_best_groups(self, corrected: torch.Tensor) -> torch.Tensor:
        grouped = corrected.view(len(corrected), self.groups, -1)
        value = grouped.topk(2, dim=-1).values.sum(-1)  # [tokens, groups]
        best = torch.topk(value, self.best_groups, dim=-1, sorted=False).indices
        hidden = torch.ones_like(value, dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(hidden[..., None], float("-inf")).view_as(corrected)
