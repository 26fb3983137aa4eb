"""Top-k, top-p and min-p over a vocabulary of 151,936, whole and from the shards of 8 ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.acceptance import kernel as acceptance
from kernels.acceptance import reference as acceptance_reference
from kernels.truncation import kernel as truncation
from kernels.truncation import reference as truncation_reference
from tests.gpu.case import Case, Machine

SHARDS = 8


def truncation_cases(machine: Machine) -> Iterator[Case]:
    rows, vocabulary, count = (1024, 151_936, 256) if machine.shrink == 1 else (2, 1200, 32)
    logits = machine.normal(rows, vocabulary, dtype=torch.float32) * 3
    for top_k, top_p in ((20, 0.95), (0, 0.95)):
        yield _whole(machine, logits, top_k, top_p)
    yield _sampled(machine, logits)
    shard = logits[:, : vocabulary // SHARDS]
    temperatures = _filled(machine, rows, 0.7)
    yield Case(
        f"candidates {rows} x {vocabulary // SHARDS}, {count} of them",
        lambda: truncation.candidates(shard, temperatures, count)[1:],
        lambda: truncation_reference.candidates(shard, temperatures, count)[1:],
        moved=4 * rows * (vocabulary // SHARDS + count),
        library=lambda: shard.topk(count),
        tolerance=1e-6,
    )
    yield _joined(machine, logits, temperatures, count)
    yield _settled(machine, shard, count)


def _filled(machine: Machine, rows: int, value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.full((rows,), value, dtype=dtype, device=machine.device)


def _params(machine: Machine, rows: int, top_k: int, top_p: float) -> tuple[torch.Tensor, ...]:
    """temperatures, top_k, top_p, min_p."""
    whole = _filled(machine, rows, top_k, torch.int32)
    return _filled(machine, rows, 0.7), whole, _filled(machine, rows, top_p), _filled(machine, rows, 0.0)


def _whole(machine: Machine, logits: torch.Tensor, top_k: int, top_p: float) -> Case:
    temperatures, keeps, share, floor = _params(machine, len(logits), top_k, top_p)

    def library() -> torch.Tensor:
        """As samplers built on torch do it: sort everything, then sum up the probabilities."""
        best = logits.sort(dim=-1, descending=True).values / 0.7
        return best.softmax(-1).cumsum(-1)

    return Case(
        f"truncate {len(logits)} x {logits.shape[1]}, top_k {top_k}, top_p {top_p}",
        lambda: truncation.truncate(logits, temperatures, keeps, share, floor),
        lambda: truncation_reference.truncate(logits, temperatures, keeps, share, floor),
        moved=logits.nbytes,
        library=library,
        tolerance=1e-12,
    )


def _sampled(machine: Machine, logits: torch.Tensor) -> Case:
    temperatures, keeps, share, floor = _params(machine, len(logits), 20, 0.95)
    thresholds = truncation.truncate(logits, temperatures, keeps, share, floor)
    keys = torch.randint(-(2**62), 2**62, (len(logits),), device=machine.device)
    return Case(
        f"sample {len(logits)} x {logits.shape[1]} above a threshold",
        lambda: acceptance.sample(logits, keys, temperatures, thresholds=thresholds),
        lambda: acceptance_reference.sample(logits, keys, temperatures, thresholds=thresholds),
        moved=logits.nbytes,
        tolerance=1e-12,
    )


def _joined(machine: Machine, logits: torch.Tensor, temperatures: torch.Tensor, count: int) -> Case:
    """What a rank does with all ranks' candidates; the reference has all logits."""
    _, keeps, share, floor = _params(machine, len(logits), 20, 0.95)
    found = [truncation_reference.candidates(part, temperatures, count) for part in logits.chunk(SHARDS, dim=-1)]
    shards = truncation_reference.Candidates(*map(torch.stack, zip(*found)))
    return Case(
        f"truncate_shards {SHARDS} x {len(logits)} x {count}, top_k 20, top_p 0.95",
        lambda: truncation.truncate_shards(shards, temperatures, keeps, share, floor)[0],
        lambda: truncation_reference.truncate(logits, temperatures, keeps, share, floor),
        moved=2 * shards.values.nbytes,
        tolerance=1e-12,
    )


def _settled(machine: Machine, shard: torch.Tensor, count: int) -> Case:
    """One rank's share of a search for flat rows; it hears no other, and no exchange is timed."""
    _, keeps, share, floor = _params(machine, len(shard), 0, 0.99)
    params = _filled(machine, len(shard), 5.0), keeps, share, floor
    shards = truncation_reference.Candidates(*(part[None] for part in truncation.candidates(shard, params[0], count)))
    thresholds, settled = truncation.truncate_shards(shards, *params)

    def settle(way: Any) -> torch.Tensor:
        own = thresholds.clone()
        way.settle_shards(shard, shards, own, settled, *params, lambda part: part[None])
        return own

    return Case(
        f"settle_shards 1 x {len(shard)} x {shard.shape[1]}, all open, top_p 0.99",
        lambda: settle(truncation),
        lambda: settle(truncation_reference),
        moved=6 * 4 * shard.numel(),
        tolerance=1e-12,
    )
