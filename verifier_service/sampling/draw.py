"""Seeded sampling of rows of logits, each with its own temperature and truncation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cluster.contracts import SamplingParams
from modeling.copies import to_device
from verifier_service.plan import RowDraw
from verifier_service.sampling.edits import Edits
from verifier_service.sampling.race import race, row_keys, signed
from verifier_service.sequence import GREEDY_BELOW

CANDIDATES = 256  # truncation is decided among the most probable tokens where they settle it, else by a full sort


@dataclass(frozen=True)
class Draw:
    """Rows row .. row + count - 1 of the logits are one request's; row + i is sampled for position `position` + i.

    edits: of these rows' logits, before anything else.
    """

    row: int
    count: int
    position: int
    seed: int
    choice: int
    params: SamplingParams
    edits: Edits | None = None

    @property
    def greedy(self) -> bool:
        return self.params.temperature < GREEDY_BELOW


def draw_rows(logits: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """Their row numbers and tokens, both int64 [sampled rows]. At least one draw, none greedy."""
    rows, wanted = wanted_rows(draws, logits.device)
    own = logits if len(rows) == logits.shape[0] else logits.index_select(0, rows)
    if own.is_cuda:
        from verifier_service.sampling.kernel_draw import draw_by_kernels  # brings triton

        return rows, draw_by_kernels(own, wanted)
    tokens = torch.empty_like(rows)
    ordered = (wanted.top_k > 0) | (wanted.top_p < 1.0)  # truncation that takes an order of the tokens
    _fill(tokens, own, wanted, (~ordered).nonzero()[:, 0], _from_all)
    _fill(tokens, own, wanted, ordered.nonzero()[:, 0], _from_kept)
    return rows, tokens


def wanted_rows(draws: Sequence[Draw | RowDraw], device: torch.device) -> tuple[torch.Tensor, WantedRows]:
    """The row numbers int64 [sampled rows], and how each is sampled; on `device`."""
    counts = torch.tensor([draw.count for draw in draws])
    within = torch.cat([torch.arange(draw.count) for draw in draws])

    def spread(values: Sequence[float], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).repeat_interleave(counts)

    def there(values: torch.Tensor) -> torch.Tensor:
        return to_device(values, device)

    rows = there(spread([draw.row for draw in draws]) + within)
    keys = row_keys(
        spread([signed(draw.seed) for draw in draws]),
        spread([draw.choice for draw in draws]),
        spread([draw.position for draw in draws]) + within,
    )
    wanted = WantedRows(
        any(truncates(draw.params) for draw in draws),
        there(keys),
        there(spread([draw.params.temperature for draw in draws], torch.float64)),
        there(spread([draw.params.top_p for draw in draws], torch.float64)),
        there(spread([draw.params.min_p for draw in draws], torch.float64)),
        there(spread([draw.params.top_k for draw in draws])),
    )
    return rows, wanted


def every_row(draws: Sequence[RowDraw], count: int) -> WantedRows:
    """How each of `count` rows is sampled, in order; those of no draw are greedy, at temperature 0. On the CPU."""
    every = WantedRows(
        any(truncates(draw.params) for draw in draws),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.float64),
        torch.ones(count, dtype=torch.float64),
        torch.zeros(count, dtype=torch.float64),
        torch.zeros(count, dtype=torch.int64),
    )
    if draws:
        rows, wanted = wanted_rows(draws, torch.device("cpu"))
        for own, theirs in zip(every.columns(), wanted.columns(), strict=True):
            own[rows] = theirs
    return every


@dataclass(frozen=True)
class WantedRows:
    """Per sampled row: keys int64, temperature, top_p, min_p float64 (0 = off), top_k int64 (0 = off).

    truncated: whether any of the rows is; on the host, so that nobody waits for a device to learn it.
    """

    truncated: bool
    keys: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor

    def columns(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.temperature, self.top_p, self.min_p, self.top_k

    def at(self, index: torch.Tensor) -> WantedRows:
        return WantedRows(self.truncated, *(column[index] for column in self.columns()))

    def to(self, device: torch.device) -> WantedRows:
        """Nobody waits for a copy to a GPU."""
        return WantedRows(self.truncated, *(to_device(column, device) for column in self.columns()))


Method = Callable[[torch.Tensor, WantedRows], torch.Tensor]


def truncates(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0


def _fill(tokens: torch.Tensor, logits: torch.Tensor, rows: WantedRows, index: torch.Tensor, method: Method) -> None:
    if len(index) == len(tokens):
        tokens.copy_(method(logits, rows))
    elif len(index):
        tokens[index] = method(logits.index_select(0, index), rows.at(index))


def _from_all(logits: torch.Tensor, rows: WantedRows) -> torch.Tensor:
    ids = torch.arange(logits.shape[1], device=logits.device)
    scaled = logits.to(torch.float64).div_(rows.temperature[:, None])
    if bool((rows.min_p > 0).any()):
        scaled.masked_fill_(scaled < scaled.amax(dim=-1, keepdim=True) + rows.min_p.log()[:, None], -torch.inf)
    return race(scaled, ids, rows.keys).argmax(dim=-1)


def _from_kept(logits: torch.Tensor, rows: WantedRows) -> torch.Tensor:
    tokens, settled = _from_candidates(logits, rows, min(CANDIDATES, logits.shape[1]))
    if not bool(settled.all()):
        rest = (~settled).nonzero()[:, 0]
        tokens[rest] = _from_candidates(logits[rest], rows.at(rest), logits.shape[1])[0]
    return tokens


def _from_candidates(logits: torch.Tensor, rows: WantedRows, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sampled among the `count` best; settled: everything that truncation keeps is among them.

    top_k first, then top_p of what is left, then min_p, as transformers has them. All are thresholds on the logit, so
    that equal logits stand or fall together and no sort order decides. Noise of removed tokens is never computed.
    """
    best, ids = logits.topk(count, dim=-1)
    values = best.to(torch.float64).div_(rows.temperature[:, None])
    has_k, has_p = (rows.top_k > 0)[:, None], (rows.top_p < 1.0)[:, None]
    kth = torch.where(rows.top_k > 0, rows.top_k.clamp(max=count), count) - 1
    kth_value = values.gather(1, kth[:, None])
    kept = values >= kth_value
    norm = values.masked_fill(~kept, -torch.inf).logsumexp(dim=-1, keepdim=True)
    if not bool(has_k.all()):
        everything = (logits / rows.temperature[:, None]).logsumexp(dim=-1, keepdim=True)
        norm = torch.where(has_k, norm, everything)
    mass = (values - norm).exp_().masked_fill_(~kept, 0.0)
    before = mass.cumsum(dim=-1) - mass
    kept &= (before < rows.top_p[:, None]) | ~has_p
    kept &= values >= values[:, :1] + rows.min_p.log()[:, None]  # log 0 = -inf: off
    threshold = values.masked_fill(~kept, torch.inf).amin(dim=-1, keepdim=True)
    kept = values >= threshold
    least = values[:, -1:]
    # Of a top_k that is not all among the candidates, the norm lacks some: it matters to top_p alone.
    # Where a grammar leaves fewer tokens than there are candidates, no other has any mass.
    settled = ((least == -torch.inf) | ((least < threshold) & ((least < kth_value) | ~has_k | ~has_p)))[:, 0]
    longest = max(1, int(kept.sum(dim=-1).max()))  # of logits that are not finite none may be kept
    values, ids, kept = values[:, :longest], ids[:, :longest], kept[:, :longest]
    winner = race(values, ids, rows.keys).masked_fill_(~kept, -torch.inf).argmax(dim=-1, keepdim=True)
    return ids.gather(1, winner)[:, 0], settled | (count == logits.shape[1])
