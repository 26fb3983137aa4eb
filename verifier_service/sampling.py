"""The target's own token at each position: argmax, or seeded sampling by the Gumbel-max method.

Every random number is a hash of (seed, choice, absolute position, token id) and of nothing else: a sample does not
depend on the batch, on the number of ranks, on how many rows are verified at once or on whether drafts were used.
argmax(log p + Gumbel noise) draws exactly from p; noise of tokens that truncation removed is never computed where few
are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cluster.contracts import SamplingParams, TokenLogprobs
from verifier_service.sequence import GREEDY_BELOW

CANDIDATES = 256  # truncation is decided among the most probable tokens where they settle it, else by a full sort
NO_TOKEN = -1  # the logits of a row hold NaN or +inf, or nothing above -inf: the model said nothing
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class Draw:
    """Rows row .. row + count - 1 of the logits are one request's; row + i is sampled for position `position` + i."""

    row: int
    count: int
    position: int
    seed: int
    choice: int
    params: SamplingParams


def sample(logits: torch.Tensor, draws: Sequence[Draw] = ()) -> list[int]:
    """A token for each row of logits (float32 [rows, vocabulary]): greedy, except for the rows of `draws`.

    NO_TOKEN where the logits are not finite; such a row changes no other.
    """
    tokens = logits.argmax(dim=-1)  # NaN counts as the largest
    broken = ~logits.gather(1, tokens[:, None])[:, 0].isfinite()
    if draws:
        tokens.index_copy_(0, *_sample_rows(logits, draws))
    return tokens.masked_fill_(broken, NO_TOKEN).tolist()


def logprobs(logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Of token_ids[i] at row rows[i], with the `top` most probable tokens. Before temperature and truncation."""
    device = logits.device
    chosen = torch.log_softmax(logits.index_select(0, torch.tensor(rows, device=device)), dim=-1)
    own = chosen.gather(1, torch.tensor(token_ids, device=device)[:, None])[:, 0].tolist()
    if top == 0:
        return [TokenLogprobs(value) for value in own]
    best = chosen.topk(min(top, chosen.shape[1]), dim=-1)
    pairs = zip(own, best.indices.tolist(), best.values.tolist())
    return [TokenLogprobs(value, tuple(zip(ids, values))) for value, ids, values in pairs]


def uniform(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1), a pure function of key and token id (broadcast against each other): splitmix64."""
    bits = _mix(token_ids * _GOLDEN + keys)
    return _shift(bits, 11, bits).to(torch.float64).add_(0.5).mul_(2.0**-53)


def row_keys(seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64 [rows]: all that a row's random numbers depend on, apart from the token id."""
    keys = _mix(seeds + _GOLDEN)
    keys = _mix(keys + (choices + 1) * _GOLDEN)
    return _mix(keys + (positions + 1) * _GOLDEN)


@dataclass(frozen=True)
class _Rows:
    """Per sampled row: keys int64, temperature, top_p float64, top_k int64 (0 = off)."""

    keys: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor

    def at(self, index: torch.Tensor) -> _Rows:
        return _Rows(self.keys[index], self.temperature[index], self.top_p[index], self.top_k[index])


Method = Callable[[torch.Tensor, _Rows], torch.Tensor]


def _sample_rows(logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """Their row numbers and tokens, both int64 [sampled rows]."""
    device = logits.device
    counts = torch.tensor([draw.count for draw in draws])
    within = torch.cat([torch.arange(draw.count) for draw in draws])

    def spread(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts)

    rows = (spread([draw.row for draw in draws]) + within).to(device)
    keys = row_keys(
        spread([_signed(draw.seed) for draw in draws]),
        spread([draw.choice for draw in draws]),
        spread([draw.position for draw in draws]) + within,
    )
    wanted = _Rows(
        keys.to(device),
        spread([max(draw.params.temperature, GREEDY_BELOW) for draw in draws], torch.float64).to(device),
        spread([draw.params.top_p for draw in draws], torch.float64).to(device),
        spread([draw.params.top_k for draw in draws]).to(device),
    )
    own = logits if len(rows) == logits.shape[0] else logits.index_select(0, rows)
    tokens = torch.empty_like(rows)
    truncated = spread([draw.params.top_k > 0 or draw.params.top_p < 1.0 for draw in draws], torch.bool).to(device)
    _fill(tokens, own, wanted, (~truncated).nonzero()[:, 0], _from_all)
    _fill(tokens, own, wanted, truncated.nonzero()[:, 0], _from_kept)
    return rows, tokens


def _fill(tokens: torch.Tensor, logits: torch.Tensor, rows: _Rows, index: torch.Tensor, method: Method) -> None:
    if len(index) == len(tokens):
        tokens.copy_(method(logits, rows))
    elif len(index):
        tokens[index] = method(logits.index_select(0, index), rows.at(index))


def _from_all(logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
    ids = torch.arange(logits.shape[1], device=logits.device)
    scaled = logits.to(torch.float64).div_(rows.temperature[:, None])
    return _race(scaled, ids, rows.keys).argmax(dim=-1)


def _from_kept(logits: torch.Tensor, rows: _Rows) -> torch.Tensor:
    tokens, settled = _from_candidates(logits, rows, min(CANDIDATES, logits.shape[1]))
    if not bool(settled.all()):
        rest = (~settled).nonzero()[:, 0]
        tokens[rest] = _from_candidates(logits[rest], rows.at(rest), logits.shape[1])[0]
    return tokens


def _from_candidates(logits: torch.Tensor, rows: _Rows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled among the `count` best; settled: everything that truncation keeps is among them.

    top_k first, then top_p of what is left, as usual. Both are thresholds on the logit, so that equal logits stand or
    fall together and no sort order decides.
    """
    best, ids = logits.topk(count, dim=-1)
    values = best.to(torch.float64).div_(rows.temperature[:, None])
    has_k = (rows.top_k > 0)[:, None]
    kth = torch.where(rows.top_k > 0, rows.top_k.clamp(max=count), count) - 1
    kth_value = values.gather(1, kth[:, None])
    kept = values >= kth_value
    norm = values.masked_fill(~kept, -torch.inf).logsumexp(dim=-1, keepdim=True)
    if not bool(has_k.all()):
        everything = (logits / rows.temperature[:, None]).logsumexp(dim=-1, keepdim=True)
        norm = torch.where(has_k, norm, everything)
    mass = (values - norm).exp_().masked_fill_(~kept, 0.0)
    before = mass.cumsum(dim=-1) - mass
    kept &= (before < rows.top_p[:, None]) | (rows.top_p >= 1.0)[:, None]
    threshold = values.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
    kept = values >= threshold
    least = values[:, -1:]
    settled = ((least < threshold) & ((least < kth_value) | ~has_k))[:, 0]  # else the norm may lack some of top_k
    longest = max(1, int(kept.sum(dim=-1).max()))  # of logits that are not finite none may be kept
    values, ids, kept = values[:, :longest], ids[:, :longest], kept[:, :longest]
    winner = _race(values, ids, rows.keys).masked_fill_(~kept, -torch.inf).argmax(dim=-1, keepdim=True)
    return ids.gather(1, winner)[:, 0], settled | (count == logits.shape[1])


def _race(values: torch.Tensor, ids: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """values + Gumbel noise, float64 [rows, ids]."""
    return values - uniform(keys[:, None], ids).log_().neg_().log_()


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, in place, on int64 (which wraps around as the unsigned arithmetic does)."""
    shifted = torch.empty_like(bits)
    bits.bitwise_xor_(_shift(bits, 30, shifted)).mul_(_MIX1)
    bits.bitwise_xor_(_shift(bits, 27, shifted)).mul_(_MIX2)
    return bits.bitwise_xor_(_shift(bits, 31, shifted))


def _shift(bits: torch.Tensor, count: int, out: torch.Tensor) -> torch.Tensor:
    """Logical shift to the right."""
    torch.bitwise_right_shift(bits, count, out=out)
    return out.bitwise_and_((1 << (64 - count)) - 1)


def _signed(number: int) -> int:
    """Any integer seed as the int64 with the same low 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
