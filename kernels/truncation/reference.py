"""Truncation in plain torch, by sorting whole rows, and what shards of a vocabulary exchange for it.

A truncation is a threshold on logit / temperature: equal logits stand or fall together and no sort order decides.
top_k first, then top_p of what is left (arXiv 1904.09751), then min_p (arXiv 2407.01082). kernels.acceptance.sample
takes the thresholds. Biases, penalties and masks are edits of the logits before all this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Candidates(NamedTuple):
    """What a shard of the vocabulary says about each row, so that nobody needs all logits.

    values float32 [rows, count]: its largest logits, in any order. bound float32 [rows]: the largest logit that may be
    missing among them, -inf if none is. peak float32 [rows]: the largest of all. mass float64 [rows]: the sum of
    exp((logit - peak) / temperature) of all. Of several shards: each with [shards] in front.
    """

    values: torch.Tensor
    bound: torch.Tensor
    peak: torch.Tensor
    mass: torch.Tensor


def truncate(
    logits: torch.Tensor, temperatures: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """float64 [rows]: a token of a row stands if logit / temperature is at least this; -inf where all do.

    logits float [rows, vocabulary]; temperatures float64 [rows], 0 = greedy, which nothing truncates; top_k int32
    [rows], 0 = off; top_p float64 [rows], from 1 on = off; min_p float64 [rows], 0 = off. A token stands in top_p if
    those with larger logits weigh less than it. Raises ValueError for shapes or dtypes that do not fit.
    """
    check_arguments(logits, temperatures, top_k, top_p, min_p)
    return _cut(logits, temperatures, top_k, top_p, min_p, None)[0]


def candidates(logits: torch.Tensor, temperatures: torch.Tensor, count: int) -> Candidates:
    """The `count` largest logits of each row of a shard (all, if it has fewer). Raises ValueError if count < 1."""
    check_count(count)
    values = logits.float().topk(min(count, logits.shape[1]), dim=-1).values
    bound = values[:, -1] if count < logits.shape[1] else torch.full_like(values[:, 0], float("-inf"))
    scaled = _scaled(logits, temperatures)
    return Candidates(values, bound, values[:, 0], (scaled - _finite(scaled.amax(-1, keepdim=True))).exp().sum(-1))


def truncate_shards(
    shards: Candidates,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(thresholds as `truncate` gives them for the whole vocabulary, settled bool [rows]).

    A row is settled if its candidates decide it; of one that is not, the threshold means nothing, and its logits have
    to be gathered. Greedy rows, min_p and a top_k within the candidates are always settled.
    """
    together = shards.values.transpose(0, 1).flatten(1)
    check_arguments(together, temperatures, top_k, top_p, min_p)
    bound = _scaled(shards.bound.amax(0)[:, None], temperatures)[:, 0]
    threshold, kth, nucleus = _cut(together, temperatures, top_k, top_p, min_p, total_mass(shards, temperatures))
    has_k, has_p = top_k > 0, top_p < 1
    settled = ~has_k | torch.where(has_p, kth > bound, kth >= bound)
    settled &= ~has_p | has_k | (nucleus >= bound)
    return threshold, settled | (bound == float("-inf")) | (temperatures == 0)


def settle_shards(
    logits: torch.Tensor,
    shards: Candidates,
    thresholds: torch.Tensor,
    settled: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The thresholds of rows that are not settled, in place; collective.

    logits float [rows, share]: this shard's. shards, and thresholds and settled as `truncate_shards` gave them; a top_k
    is within the candidates, or off. gather: a tensor of every shard, alike in shape -> [shards, ...], with no other
    effect.
    """
    whole = torch.cat(gather(logits).unbind(), dim=1)
    own = truncate(whole, temperatures, top_k, top_p, min_p)
    thresholds.copy_(torch.where(settled, thresholds, own))


def total_mass(shards: Candidates, temperatures: torch.Tensor) -> torch.Tensor:
    """float64 [rows]: the sum of exp((logit - largest logit) / temperature) over the shards."""
    peaks = shards.peak.double() / temperatures.masked_fill(temperatures == 0, 1.0)
    return (shards.mass * (peaks - _finite(peaks.amax(0))).exp()).sum(0)


def _cut(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    total: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The threshold, and those of top_k and top_p by themselves (-inf if they spare everything). total: without top_k,
    the mass of all tokens over that of the largest; None: the logits are all there is."""
    values = _scaled(logits, temperatures).sort(dim=-1, descending=True).values
    largest, everything = values[:, :1], torch.full_like(values[:, :1], float("-inf"))
    has_k, has_p = (top_k > 0)[:, None], (top_p < 1)[:, None]
    kth = values.gather(1, (top_k.long() - 1).clamp(0, values.shape[1] - 1)[:, None])
    kth = torch.where(has_k & (top_k <= values.shape[1])[:, None], kth, everything)
    mass = (values - _finite(largest)).exp().masked_fill(values < kth, 0.0)
    own = mass.sum(-1, keepdim=True)
    share = mass / (own if total is None else torch.where(has_k, own, total[:, None]))
    reached = (share.cumsum(-1) >= top_p[:, None]).long()
    last = reached.argmax(-1, keepdim=True)
    nucleus = torch.where(has_p & reached.any(-1, keepdim=True), values.gather(1, last), everything)
    least = torch.maximum(torch.maximum(kth, nucleus), largest + min_p.log()[:, None])[:, 0]
    return least.masked_fill(temperatures == 0, float("-inf")), kth[:, 0], nucleus[:, 0]


def _scaled(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    return logits.double() / temperatures.masked_fill(temperatures == 0, 1.0)[:, None]


def _finite(largest: torch.Tensor) -> torch.Tensor:
    return largest.masked_fill(largest == float("-inf"), 0.0)


def check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count is {count}: want at least one candidate")


def check_arguments(
    logits: torch.Tensor, temperatures: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """Raises ValueError naming the argument that does not fit the others."""
    if logits.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be [rows, vocabulary]")
    for name, tensor, dtype in (
        ("temperatures", temperatures, torch.float64),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float64),
        ("min_p", min_p, torch.float64),
    ):
        if tensor.shape != logits.shape[:1] or tensor.dtype != dtype:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} must be {dtype} [{logits.shape[0]}]")
