"""Routed experts: the tile map, both grouped products, the weighted sum."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.linear.matrix import Matrix
from kernels.linear.reference import add_leaves
from kernels.moe import assignment, kernel, reference
from kernels.moe.tiles import most_tiles
from tests.kernels.products import FORMATS, close, random_matrix, sum_products_in_order

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
EXPERTS, TOP_K = 5, 2


def choices(tokens: int, experts: int = EXPERTS, top_k: int = TOP_K) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).int()


def experts_of(
    way: ModuleType,
    x: torch.Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    *,
    rows: int = 16,
    leaves: int | None = None,
    sections: int | None = None,
) -> torch.Tensor:
    tiles = way.assign(chosen, gate.shape[0], rows)
    inner = way.gate_up(x, gate, up, tiles, chosen, sections=sections)
    outer = way.down(inner, down, tiles, leaves=leaves)
    return way.combine(outer, weights, chosen, dtype=torch.float32)


@WAYS
@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**20),
    nobody=st.booleans(),
)
@settings(max_examples=25, deadline=None, database=None)
def test_every_pair_is_in_one_tile_of_its_expert(way, tokens: int, experts: int, top_k: int, seed: int, nobody: bool):
    rows = 2
    torch.manual_seed(seed)
    chosen = torch.randint(-1 if nobody else 0, experts, (tokens, top_k), dtype=torch.int32)
    tiles = way.assign(chosen, experts, rows)
    assert len(tiles.experts) == most_tiles(tokens * top_k, experts, rows)
    used = tiles.experts >= 0
    assert used.tolist() == sorted(used.tolist(), reverse=True)
    flat, seen = chosen.flatten(), []
    for expert, pairs in zip(tiles.experts[used].tolist(), tiles.pairs[used].tolist(), strict=True):
        own = [pair for pair in pairs if pair >= 0]
        assert own == pairs[: len(own)] != []
        assert all(flat[pair] == expert for pair in own)
        seen += own
    assert seen == torch.sort(torch.where(flat < 0, experts, flat), stable=True).indices[: len(seen)].tolist()
    assert len(seen) == int((flat >= 0).sum())


def test_more_pairs_than_a_chunk_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assignment, "CHUNK", 32)
    chosen = choices(45)
    got, want = (way.assign(chosen, EXPERTS, 16) for way in (kernel, reference))
    assert torch.equal(got.experts, want.experts)
    used = want.experts >= 0
    assert torch.equal(got.pairs[used], want.pairs[used])


@pytest.mark.parametrize("sections", [1, 2])
@pytest.mark.parametrize("name", ["plain", *FORMATS])
def test_experts_of_every_format_agree_with_the_reference(name: str, sections: int):
    hidden, width = 96, 48
    gate, up = (random_matrix(name, EXPERTS, width, hidden) for _ in range(2))
    down = random_matrix(name, EXPERTS, hidden, width)
    x, weights, chosen = torch.randn(6, hidden) / 8, torch.rand(6, TOP_K), choices(6)
    got, want = (experts_of(way, x, gate, up, down, weights, chosen, sections=sections) for way in (kernel, reference))
    close(got, want)


def test_half_precision_experts_round_where_the_reference_rounds():
    gate, up, down = (random_matrix("int4", EXPERTS, *shape) for shape in ((32, 64), (32, 64), (64, 32)))
    x, weights, chosen = torch.randn(4, 64).half() / 8, torch.rand(4, TOP_K), choices(4)
    got, want = (experts_of(way, x, gate, up, down, weights, chosen) for way in (kernel, reference))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * float(want.abs().max()))


@pytest.mark.parametrize("sections", [1, 2])
@pytest.mark.parametrize("clamp", [None, (1.702, 2.0)])
def test_biases_and_clamps_are_those_of_the_reference(clamp: tuple[float, float] | None, sections: int):
    gate_up, down = random_matrix("plain", EXPERTS, 40, 64), random_matrix("plain", EXPERTS, 64, 20)
    bias, down_bias = torch.randn(EXPERTS, 40), torch.randn(EXPERTS, 64)
    x, weights, chosen = torch.randn(5, 64), torch.rand(5, TOP_K), choices(5)
    totals = []
    for way in (kernel, reference):
        tiles = way.assign(chosen, EXPERTS, 16)
        inner = way.gate_up(
            x, gate_up.rows(0, 20), gate_up.rows(20, 40), tiles, chosen, bias=bias, clamp=clamp, sections=sections
        )
        outer = way.down(inner, down, tiles, leaves=2)
        totals.append(way.combine(outer, weights, chosen, down_bias, dtype=torch.float32))
    close(*totals)


@WAYS
def test_a_choice_of_nobody_adds_nothing(way):
    gate, up, down = (random_matrix("plain", EXPERTS, *shape) for shape in ((16, 32), (16, 32), (32, 16)))
    x, weights, chosen = torch.randn(3, 32), torch.rand(3, TOP_K), choices(3)
    want = experts_of(way, x[:2], gate, up, down, weights[:2], chosen[:2])
    x[2], chosen[2] = float("nan"), -1
    got = experts_of(way, x, gate, up, down, weights, chosen)
    assert not got[:, 2].any()
    torch.testing.assert_close(got[:, :2], want)


@pytest.mark.parametrize("name", ["plain", "fp8", "int4"])
def test_the_bits_of_a_token_do_not_depend_on_the_batch(name: str, monkeypatch: pytest.MonkeyPatch):
    sum_products_in_order(monkeypatch)
    gate, up, down = (random_matrix(name, EXPERTS, *shape) for shape in ((32, 64), (32, 64), (64, 32)))
    x, weights, chosen = torch.randn(20, 64) / 8, torch.rand(20, TOP_K), choices(20)
    chosen[:18] = torch.tensor([1, 3])  # more than a tile of 16
    together = experts_of(kernel, x, gate, up, down, weights, chosen, rows=16)
    wide = experts_of(kernel, x, gate, up, down, weights, chosen, rows=64)
    alone = [
        experts_of(kernel, x[i : i + 1], gate, up, down, weights[i : i + 1], chosen[i : i + 1])[:, 0]
        for i in (0, 17, 19)
    ]
    assert torch.equal(together, wide)
    assert torch.equal(together[:, [0, 17, 19]], torch.stack(alone, 1))


@pytest.mark.parametrize("name", ["plain", "fp8", "int4"])
def test_leaves_give_the_same_bits_for_every_number_of_ranks(name: str, monkeypatch: pytest.MonkeyPatch):
    sum_products_in_order(monkeypatch)
    hidden, width, leaves = 32, 128, 4
    gate, up = (random_matrix(name, EXPERTS, width, hidden) for _ in range(2))
    down = random_matrix(name, EXPERTS, hidden, width)
    x, weights, chosen = torch.randn(3, hidden), torch.rand(3, TOP_K), choices(3)
    totals = []
    for ranks in (1, 2, 4):
        share = width // ranks
        parts = []
        for begin in range(0, width, share):
            end = begin + share
            own = gate.rows(begin, end), up.rows(begin, end), down.columns(begin, end)
            partial = experts_of(kernel, x, *own, weights, chosen, leaves=leaves // ranks, sections=2)
            parts.append(add_leaves(partial))
        totals.append(add_leaves(torch.stack(parts)))
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])
    close(totals[0], experts_of(reference, x, gate, up, down, weights, chosen)[0])


@WAYS
def test_what_does_not_fit_is_named(way):
    x, chosen = torch.zeros(2, 32), choices(2)
    tiles = way.assign(chosen, EXPERTS, 16)
    gate = Matrix(torch.zeros(EXPERTS, 16, 32))
    with pytest.raises(ValueError, match="packed otherwise"):
        way.gate_up(x, gate, Matrix(torch.zeros(EXPERTS, 8, 32)), tiles, chosen)
    with pytest.raises(ValueError, match=r"x \(2, 32\)"):
        way.gate_up(x, Matrix(torch.zeros(EXPERTS, 16, 33)), Matrix(torch.zeros(EXPERTS, 16, 33)), tiles, chosen)
    with pytest.raises(ValueError, match="3 leaves"):
        way.down(torch.zeros(4, 16), Matrix(torch.zeros(EXPERTS, 8, 16)), tiles, leaves=3)
