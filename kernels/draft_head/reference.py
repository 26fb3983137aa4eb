"""The draft head in plain torch: all logits, then argmax and log-sum-exp."""

from __future__ import annotations

import torch

from kernels.draft_head.choice import PLAIN, HeadCandidates, HeadChoice, HeadShape, check_arguments


def draft_head(
    hidden: torch.Tensor, weight: torch.Tensor, *, shape: HeadShape = PLAIN, first_token: int = 0
) -> HeadChoice:
    """hidden [rows, width] times weight [vocabulary, width], both of one floating dtype; logits in float32.

    first_token: id of the weight's first row, where it is a shard of the vocabulary. Raises ValueError for shapes or
    dtypes that do not fit.
    """
    check_arguments(hidden, weight)
    logits = shape.of(hidden.float() @ weight.float().t())
    best = logits.amax(dim=-1)
    ids = torch.arange(weight.shape[0], device=weight.device).expand_as(logits)
    token_ids = ids.masked_fill(logits != best[:, None], weight.shape[0]).amin(dim=-1)
    return HeadChoice(token_ids + first_token, best, logits.logsumexp(dim=-1))


def draft_candidates(
    hidden: torch.Tensor, weight: torch.Tensor, k: int, *, shape: HeadShape = PLAIN, first_token: int = 0
) -> HeadCandidates:
    """As `draft_head`, with the k best tokens of each row. Raises ValueError for a k that the weight does not have."""
    check_arguments(hidden, weight, k)
    logits = shape.of(hidden.float() @ weight.float().t())
    best, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    return HeadCandidates(token_ids[:, :k] + first_token, best[:, :k], logits.logsumexp(dim=-1))
