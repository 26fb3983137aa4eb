"""Acceptance in plain torch: the target's own token at every row, then how many drafts it confirms.

A row is greedy at temperature 0, and else drawn by the Gumbel-max method: the largest of logit / temperature + noise is
an exact sample of the softmax. The noise is a hash of the row's key and the token id alone, so that a draw does not
depend on the batch, the device or the shard of the vocabulary a token lives in.
"""

from __future__ import annotations

from itertools import pairwise

import torch

# splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), as int64, which wraps around
GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def sample(
    logits: torch.Tensor,
    keys: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    thresholds: torch.Tensor | None = None,
    first_token: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids int64 [rows], scores float64 [rows]) of logits float [rows, vocabulary]; equal scores: the lowest id.

    keys int64 [rows]: all that a row's noise depends on beside the token id; temperatures float64 [rows], 0 = greedy.
    The score of a greedy row is its logit. thresholds float64 [rows], of kernels.truncation: what logit / temperature
    must be at least; None, and for greedy rows: nothing. first_token: id of the first column; shards of a vocabulary
    become one by `join`. The token is -1 where the logits hold NaN or +inf (its score is +inf) or nothing above -inf.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    check_arguments(logits, keys, temperatures, thresholds)
    ids = torch.arange(first_token, first_token + logits.shape[1], device=logits.device)
    greedy = temperatures == 0
    scores = logits.double() / temperatures.masked_fill(greedy, 1.0)[:, None]
    if thresholds is not None:
        scores = scores.masked_fill(~greedy[:, None] & (scores < thresholds[:, None]), float("-inf"))
    noise = -torch.log(-torch.log(uniform(keys[:, None], ids)))
    scores = torch.where(greedy[:, None], scores, scores + noise)
    best = scores.amax(dim=-1)
    last = first_token + logits.shape[1]
    token_ids = ids.expand_as(scores).masked_fill(scores != best[:, None], last).amin(dim=-1)
    broken = (logits.isnan() | logits.isposinf()).any(dim=-1)
    return token_ids.masked_fill(broken | best.isneginf(), -1), best.masked_fill(broken, float("inf"))


def join(token_ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's token from those of its parts: what `sample` gave for shards of a vocabulary, [parts, rows] each.

    The largest score wins, of equal ones the lowest id; returns (token ids, scores), [rows]. As if `sample` had seen
    the whole vocabulary. Raises ValueError for shapes that differ.
    """
    check_parts(token_ids, scores)
    best = scores.amax(dim=0)
    return token_ids.masked_fill(scores != best, torch.iinfo(torch.int64).max).amin(dim=0), best


def accept(
    samples: torch.Tensor, row_tokens: torch.Tensor, starts: torch.Tensor, *, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(accepted int32, next tokens int64), [requests] each.

    starts int32 [requests + 1]: request r verified rows starts[r] to before starts[r + 1], at least one; row_tokens
    int64 [rows]: what went into each (bonus token, then drafts); samples int64 [rows]: the target's token after each.
    A draft stands while it equals the sample before it; the next token is the sample after the last one that stands.
    longest: upper bound of a request's rows, known to the host; has no effect here.
    """
    accepted, following = [], []
    bounds = starts.tolist()
    for first, stop in pairwise(bounds):
        matches = row_tokens[first + 1 : stop] == samples[first : stop - 1]
        count = int(matches.long().cumprod(0).sum())
        accepted.append(count)
        following.append(int(samples[first + count]))
    device = samples.device
    return torch.tensor(accepted, dtype=torch.int32, device=device), torch.tensor(following, device=device)


def uniform(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1), of keys and token ids (int64, broadcast): splitmix64 from state key."""
    return ((_shift(hash_bits(keys, token_ids), 11)).double() + 0.5) * 2.0**-53


def hash_bits(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """int64: 64 random bits for each pair."""
    bits = token_ids * GOLDEN + keys
    bits = (bits ^ _shift(bits, 30)) * MIX1
    bits = (bits ^ _shift(bits, 27)) * MIX2
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def check_parts(token_ids: torch.Tensor, scores: torch.Tensor) -> None:
    if token_ids.dim() != 2 or token_ids.shape != scores.shape:
        raise ValueError(
            f"token_ids {tuple(token_ids.shape)} and scores {tuple(scores.shape)} must both be [parts, rows]"
        )


def check_arguments(
    logits: torch.Tensor, keys: torch.Tensor, temperatures: torch.Tensor, thresholds: torch.Tensor | None
) -> None:
    rows = logits.shape[0]
    if logits.dim() != 2:
        raise ValueError(f"logits {tuple(logits.shape)} must be [rows, vocabulary]")
    check_race(rows, keys, temperatures)
    if thresholds is not None and (thresholds.shape != (rows,) or thresholds.dtype != torch.float64):
        raise ValueError(f"thresholds {tuple(thresholds.shape)} {thresholds.dtype} must be float64 [{rows}]")


def check_race(rows: int, keys: torch.Tensor, temperatures: torch.Tensor) -> None:
    if keys.shape != (rows,) or temperatures.shape != (rows,):
        raise ValueError(f"keys {tuple(keys.shape)} and temperatures {tuple(temperatures.shape)} must be [{rows}]")
    if keys.dtype != torch.int64 or temperatures.dtype != torch.float64:
        raise ValueError(f"keys {keys.dtype} must be int64, temperatures {temperatures.dtype} float64")
