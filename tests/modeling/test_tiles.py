"""Tiled products and tree sums: the same numbers as torch's, and the same bits wherever a row or a column stands."""

from __future__ import annotations

import pytest
import torch

from modeling import tiles
from modeling.deterministic import DeterministicOperations
from modeling.errors import CheckpointError
from modeling.experts import ExpertWeights
from modeling.tiles import COLUMNS, ROWS, TiledProduct, tree_sum

DEPTHS = (16, 40, 100, 256, 1000, 4096)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1, 9 * ROWS])
def test_a_tiled_product_is_the_product(rows, depth):
    x, weight = torch.randn(2, rows, depth), torch.randn(2, COLUMNS + 3, depth)
    exact = x.double() @ weight.double().mT
    product = TiledProduct(weight)(x)
    assert product.shape == exact.shape
    assert (product - exact).abs().max() < 1e-4 * depth**0.5


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(depth):
    x, multiply = torch.randn(1, 20 * ROWS, depth), TiledProduct(torch.randn(1, 3 * COLUMNS, depth))
    whole = multiply(x)
    for rows in (1, 2, ROWS - 1, ROWS + 3, 7 * ROWS):
        some = torch.randperm(x.shape[1])[:rows]
        assert torch.equal(multiply(x[:, some]), whole[:, some])


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_columns_bits_do_not_depend_on_the_columns_beside_it(depth):
    x, weight = torch.randn(1, 5, depth), torch.randn(1, 4 * COLUMNS, depth)
    whole = TiledProduct(weight)(x)
    for first, stop in ((0, 2 * COLUMNS), (2 * COLUMNS, 4 * COLUMNS), (24, 31), (17, 3 * COLUMNS + 5)):
        assert torch.equal(TiledProduct(weight[:, first:stop])(x), whole[:, :, first:stop])


def test_torchs_own_product_does_depend_on_the_number_of_rows():
    x, weight = torch.randn(64, 256), torch.randn(192, 256)
    assert not torch.equal(torch.nn.functional.linear(x[:1], weight), torch.nn.functional.linear(x, weight)[:1])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_branches_of_the_tree_add_up_to_the_bits_of_the_whole(size):
    x, weight = torch.randn(13, 8 * 24), torch.randn(70, 8 * 24)
    whole = tree_sum(DeterministicOperations(torch.float32).partial_linear(weight)(x))
    operations = DeterministicOperations(torch.float32, size)
    branches = [
        tree_sum(operations.partial_linear(own_weight)(own_x))
        for own_weight, own_x in zip(weight.chunk(size, 1), x.chunk(size, 1), strict=True)
    ]
    assert torch.equal(tree_sum(torch.stack(branches)), whole)
    assert not torch.equal(sum(branches[1:], branches[0]), whole) or size == 2  # one after the other is another sum


def test_experts_bits_depend_on_neither_the_batch_nor_the_number_of_ranks():
    gate, up, down = torch.randn(5, 32, 48), torch.randn(5, 32, 48), torch.randn(5, 48, 32)
    bias = torch.randn(5, 48)
    x, weights = torch.randn(30, 48), torch.rand(30, 2)
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(30)])

    def part(rank: int, size: int) -> torch.Tensor:
        own = slice(rank * 32 // size, (rank + 1) * 32 // size)
        experts = DeterministicOperations(torch.float32, size).experts(
            ExpertWeights(
                torch.cat([gate[:, own], up[:, own]], dim=1),
                down[:, :, own].contiguous(),
                down_bias=bias if rank == 0 else None,
            )
        )
        return tree_sum(experts(x[rows], weights[rows], chosen[rows]))

    rows = torch.arange(30)
    whole = part(0, 1)
    inner = torch.nn.functional.silu(torch.einsum("th,ewh->tew", x, gate)) * torch.einsum("th,ewh->tew", x, up)
    outer = torch.einsum("tew,ehw->teh", inner, down) + bias
    expected = (outer.gather(1, chosen[..., None].expand(-1, -1, 48)) * weights[..., None]).sum(1)
    assert torch.allclose(whole, expected, atol=2e-3)
    assert torch.equal(tree_sum(torch.stack([part(rank, 4) for rank in range(4)])), whole)
    rows = torch.randperm(30)[:7]
    assert torch.equal(part(0, 1), whole[rows])


def test_a_machine_whose_products_depend_on_a_rows_place_is_refused(monkeypatch):
    multiply = tiles._multiply

    def uneven(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products = multiply(x, weight)
        products[:, 0] = products[:, 0].nextafter(torch.tensor(1e9))
        return products

    monkeypatch.setattr(tiles, "_multiply", uneven)
    with pytest.raises(CheckpointError, match=r"cannot be kept on this machine: .* 40 entries .* set deterministic"):
        DeterministicOperations(torch.float32).linear(torch.zeros(4, 40))


def test_a_width_without_eight_parts_is_refused():
    with pytest.raises(CheckpointError, match="is 36 wide there: set deterministic to false"):
        DeterministicOperations(torch.float32).partial_linear(torch.zeros(4, 36))


def test_a_number_of_ranks_that_leaves_cannot_be_shared_by_is_refused():
    with pytest.raises(ValueError, match="3 ranks cannot share 8 leaves: 1, 2, 4 and 8 can"):
        DeterministicOperations(torch.float32, 3)
