"""What the head says about each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class HeadChoice(NamedTuple):
    """Per row: the best token of the vocabulary (or of one rank's shard of it) and what its probability is made of.

    token_ids int64 [rows]: the lowest id among equals. logits float32 [rows]: that token's. log_sum_exp float32 [rows]:
    over all tokens. Shards join by the largest logit and the log-sum-exp of their log_sum_exp.
    """

    token_ids: torch.Tensor
    logits: torch.Tensor
    log_sum_exp: torch.Tensor

    def probability(self) -> torch.Tensor:
        """float32 [rows]: softmax probability of the chosen token."""
        return (self.logits - self.log_sum_exp).exp()


class HeadCandidates(NamedTuple):
    """Per row the k best tokens, best first and the lowest id first among equals.

    token_ids int64 [rows, k]; logits float32 [rows, k]; log_sum_exp float32 [rows]: over all tokens.
    """

    token_ids: torch.Tensor
    logits: torch.Tensor
    log_sum_exp: torch.Tensor


def join_candidates(shards: Sequence[HeadCandidates]) -> HeadCandidates:
    """Of shards of the vocabulary in the order of their tokens: the same as of the whole."""
    logits, order = torch.cat([each.logits for each in shards], dim=-1).sort(dim=-1, descending=True, stable=True)
    token_ids = torch.cat([each.token_ids for each in shards], dim=-1).gather(-1, order)
    k = shards[0].logits.shape[-1]
    total = torch.stack([each.log_sum_exp for each in shards]).logsumexp(0)
    return HeadCandidates(token_ids[:, :k], logits[:, :k], total)


class HeadShape(NamedTuple):
    """How a checkpoint wants its logits read: times `multiplier` (above 0), then soft_cap * tanh(logit / soft_cap),
    where soft_cap 0 leaves them as they are. The order of the tokens stays the same.
    """

    multiplier: float = 1.0
    soft_cap: float = 0.0

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.multiplier
        return logits if self.soft_cap == 0 else self.soft_cap * torch.tanh(logits / self.soft_cap)


PLAIN = HeadShape()


def check_arguments(hidden: torch.Tensor, weight: torch.Tensor, k: int = 1) -> None:
    """Raises ValueError unless hidden [rows, width] fits weight [vocabulary, width] of the same dtype, and k that."""
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k is {k}: want 1 to {weight.shape[0]}, the size of the vocabulary or its shard")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}: "
            "want [rows, width] and [vocabulary, width] of one dtype"
        )
