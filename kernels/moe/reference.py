"""Routed experts in plain torch, step by step as the kernels take them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear.matrix import Matrix, check_matrix
from kernels.linear.reference import check_leaves
from kernels.moe.tiles import TileMap, most_tiles


def assign(chosen: Tensor, experts: int, rows: int) -> TileMap:
    """Tiles of `rows` pairs for chosen experts [tokens, top_k], of which -1 chooses nobody. No host waits for it."""
    flat = chosen.flatten().long()
    tiles = most_tiles(flat.numel(), experts, rows)
    order = torch.sort(torch.where(flat < 0, experts, flat), stable=True)
    first = torch.searchsorted(order.values, torch.arange(experts + 1, device=flat.device))
    needed = (first.diff() + rows - 1) // rows  # [experts]
    ends = needed.cumsum(0)
    number = torch.arange(tiles, device=flat.device)
    owner = torch.searchsorted(ends, number, right=True)
    own = owner.clamp(max=experts - 1)
    at = ((number - (ends - needed)[own]) * rows + first[own])[:, None] + torch.arange(rows, device=flat.device)
    held = (at < first[own + 1][:, None]) & (owner < experts)[:, None]
    pairs = torch.where(held, order.indices[at.clamp(max=flat.numel() - 1)], -1)
    return TileMap(torch.where(owner < experts, owner, -1).int(), pairs.int())


def gate_up(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    tiles: TileMap,
    chosen: Tensor,
    *,
    bias: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    sections: int | None = None,
) -> Tensor:
    """[tokens x top_k, width] in x's dtype: each pair's token through its expert's gate and up.

    gate and up [experts, width, hidden], x [tokens, hidden], chosen [tokens, top_k]; bias [experts, 2 x width], all
    gates first. The gate is silu(gate) x up,
    or with clamp = (alpha, limit) that of gpt-oss: gate x sigmoid(alpha x gate) x (up + 1), the gate at most `limit`,
    |up| at most `limit`; in float32, rounded once. sections: as of kernels.linear. Rows of pairs that no tile holds
    mean nothing. Raises ValueError for shapes that do not fit.
    """
    check_gate_up(x, gate, up, chosen, bias)
    inner = torch.zeros(chosen.numel(), gate.shape[1], dtype=x.dtype, device=x.device)
    for expert, pairs in _held(tiles):
        left = x[pairs // chosen.shape[1]].float()
        halves = [left @ part[expert].dense(x.dtype).float().t() for part in (gate, up)]
        if bias is not None:
            halves = [half + own for half, own in zip(halves, bias[expert].float().chunk(2), strict=True)]
        inner[pairs] = _gated(halves[0], halves[1], clamp).to(x.dtype)
    return inner


def down(inner: Tensor, weight: Matrix, tiles: TileMap, *, leaves: int | None = None) -> Tensor:
    """Each pair's row of inner [pairs, width] through its expert's weight [experts, hidden, width].

    -> [1, pairs, hidden] in inner's dtype, or with `leaves` the float32 sums of so many equal parts of the width
    [leaves, pairs, hidden]. Rows of pairs that no tile holds mean nothing. Raises ValueError for what does not fit.
    """
    check_down(inner, weight, leaves)
    count = leaves or 1
    dtype = inner.dtype if leaves is None else torch.float32
    outer = torch.zeros(count, len(inner), weight.shape[1], dtype=dtype, device=inner.device)
    for expert, pairs in _held(tiles):
        own = weight[expert].dense(inner.dtype).float().chunk(count, dim=1)
        parts = inner[pairs].float().chunk(count, dim=1)
        outer[:, pairs] = torch.stack([part @ leaf.t() for part, leaf in zip(parts, own, strict=True)]).to(dtype)
    return outer


def combine(
    outer: Tensor, weights: Tensor, chosen: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """[leaves, pairs, hidden] -> [leaves, tokens, hidden] as dtype: weighted, a token's choices added in order.

    weights and chosen [tokens, top_k]; bias [experts, hidden] belongs to every row of the first leaf. Summed in
    float32. Choices of -1 add nothing.
    """
    leaves, _, hidden = outer.shape
    rows = outer.float().view(leaves, *chosen.shape, hidden)
    held = chosen >= 0
    total = torch.zeros(leaves, len(chosen), hidden, device=outer.device)
    for choice in range(chosen.shape[1]):
        row = rows[:, :, choice].clone()
        if bias is not None:
            row[0] += bias[chosen[:, choice].clamp(min=0).long()].float()
        weighted = weights[:, choice, None].float() * row
        total = torch.where(held[:, choice, None], total + weighted, total)
    return total.to(dtype)


def check_gate_up(x: Tensor, gate: Matrix, up: Matrix, chosen: Tensor, bias: Tensor | None) -> None:
    check_matrix(gate)
    check_matrix(up)
    if (gate.shape, gate.kind, gate.block, gate.first[1]) != (up.shape, up.kind, up.block, up.first[1]):
        raise ValueError(f"gate {gate.shape} {gate.kind} is packed otherwise than up {up.shape} {up.kind}")
    if x.dim() != 2 or len(gate.shape) != 3 or x.shape[1] != gate.shape[2] or len(chosen) != len(x):
        raise ValueError(
            f"x {tuple(x.shape)} must be [tokens, hidden], the gate {gate.shape} [experts, width, hidden] and chosen "
            f"{tuple(chosen.shape)} [tokens, top_k]"
        )
    if bias is not None and bias.shape != (gate.shape[0], 2 * gate.shape[1]):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit a gate {gate.shape}")


def check_down(inner: Tensor, weight: Matrix, leaves: int | None) -> None:
    check_matrix(weight)
    if inner.dim() != 2 or len(weight.shape) != 3 or inner.shape[1] != weight.shape[2]:
        raise ValueError(
            f"inner {tuple(inner.shape)} must be [pairs, width] and the weight {weight.shape} [experts, hidden, width]"
        )
    check_leaves(weight, leaves or 1)


def _held(tiles: TileMap) -> list[tuple[int, Tensor]]:
    experts = tiles.experts.tolist()
    return [
        (expert, pairs[pairs >= 0].long()) for expert, pairs in zip(experts, tiles.pairs, strict=True) if expert >= 0
    ]


def _gated(gate: Tensor, up: Tensor, clamp: tuple[float, float] | None) -> Tensor:
    if clamp is None:
        return F.silu(gate) * up
    alpha, limit = clamp
    gate = gate.clamp(max=limit)
    return torch.sigmoid(alpha * gate) * gate * (up.clamp(-limit, limit) + 1)
