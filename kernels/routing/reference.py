"""Choosing experts in plain torch: the best of a softmax, or of sigmoid scores with a learned correction.

Experts come in the order of their scores; of equal ones the lowest number is first (torch.topk promises no order).
"""

from __future__ import annotations

import torch
from torch import Tensor

Routed = tuple[Tensor, Tensor]  # float32 weights and int32 experts, both [tokens, top_k]


def softmax_top_k(logits: Tensor, top_k: int, *, normalized: bool, count: Tensor | None = None) -> Routed:
    """The best of the softmax over all experts; logits [tokens, experts], a softmax of any floating dtype in float32.

    normalized: the chosen probabilities are scaled to add up to one. count: int32 [1], how many tokens there are: those
    beyond it choose expert -1 with weight 0. Raises ValueError for more choices than experts.
    """
    check_arguments(logits, top_k)
    probabilities = torch.softmax(logits.float(), dim=-1)
    chosen = _best(logits.float(), top_k)
    weights = probabilities.gather(1, chosen)
    if normalized:
        weights = torch.softmax(logits.float().gather(1, chosen), dim=-1)
    return _counted(weights, chosen, count)


def sigmoid_top_k(
    logits: Tensor,
    correction: Tensor,
    top_k: int,
    *,
    groups: int,
    best_groups: int,
    normalized: bool,
    scale: float,
    count: Tensor | None = None,
) -> Routed:
    """The best by sigmoid(logits) + correction [experts], weighed by the sigmoid alone (arXiv 2412.19437, 2.1.2).

    groups: experts are divided into so many runs, and only those of the `best_groups` with the highest sum of their two
    best corrected scores can be chosen. normalized: the chosen scores are divided by their sum. scale: factor of all
    weights. count: as of `softmax_top_k`. Raises ValueError for groups that do not fit.
    """
    check_arguments(logits, top_k, groups, best_groups)
    scores = torch.sigmoid(logits.float())
    corrected = scores + correction.float()
    if best_groups < groups:
        grouped = corrected.view(len(corrected), groups, -1)
        value = grouped.topk(2, dim=-1).values.sum(-1)
        hidden = torch.ones_like(value, dtype=torch.bool).scatter_(1, _best(value, best_groups), False)
        corrected = grouped.masked_fill(hidden[..., None], float("-inf")).view_as(corrected)
    chosen = _best(corrected, top_k)
    weights = scores.gather(1, chosen)
    if normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return _counted(weights * scale, chosen, count)


def check_arguments(logits: Tensor, top_k: int, groups: int = 1, best_groups: int = 1) -> None:
    if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"logits {tuple(logits.shape)} must be [tokens, experts], of which {top_k} can be chosen")
    experts = logits.shape[1]
    if experts % groups or not 1 <= best_groups <= groups or (best_groups < groups and experts // groups < 2):
        raise ValueError(
            f"{best_groups} of {groups} groups of {experts} experts: equal groups of two or more are wanted"
        )
    if top_k > experts // groups * best_groups:
        raise ValueError(f"{best_groups} of {groups} groups of {experts} experts have fewer than {top_k} experts")


def _best(scores: Tensor, count: int) -> Tensor:
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]


def _counted(weights: Tensor, chosen: Tensor, count: Tensor | None) -> Routed:
    chosen = chosen.int()
    if count is not None:
        beyond = (torch.arange(len(chosen), device=chosen.device) >= count)[:, None]
        weights, chosen = weights.masked_fill(beyond, 0.0), chosen.masked_fill(beyond, -1)
    return weights, chosen
