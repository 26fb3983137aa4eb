"""Linear layers over plain and packed weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import kernel, reference
from kernels.linear.matrix import Kind, Matrix
from tests.kernels.products import FORMATS, close, random_matrix, sum_products_in_order

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


@pytest.fixture
def exact_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    sum_products_in_order(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_plain_product_is_torchs(dtype: torch.dtype):
    x, weight, bias = torch.randn(3, 200).to(dtype), torch.randn(70, 200).to(dtype), torch.randn(70).to(dtype)
    close(kernel.linear(x, Matrix(weight), bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_product_is_that_with_the_dequantized_weight(name: str, dtype: torch.dtype):
    x, weight = torch.randn(3, 320).to(dtype), random_matrix(name, 72, 320)
    close(kernel.linear(x, weight), reference.linear(x, weight))


@pytest.mark.parametrize("columns", [(22, 128), (64, 192)])  # the second: where tiles of some formats begin
@pytest.mark.parametrize("name", FORMATS)
def test_a_part_may_begin_and_end_inside_of_blocks(name: str, columns: tuple[int, int]):
    begin, end = columns
    x, whole = torch.randn(2, end - begin), random_matrix(name, 40, 320)
    part = whole.rows(5, 31).columns(begin, end)
    assert torch.equal(part.dense(torch.float32), whole.dense(torch.float32)[5:31, begin:end])
    close(kernel.linear(x, part), reference.linear(x, part))


@WAYS
def test_every_code_of_four_bits_means_what_the_formats_say(way):
    every = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    x = torch.zeros(2, 32)
    x[0, 0] = x[1, 1] = 1  # the low and the high half of the first byte
    meant: dict[Kind, list[float]] = {
        "int4": [code - 8.0 for code in range(16)],
        "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6],
    }
    for kind, values in meant.items():
        got = way.linear(x, Matrix(every, kind, torch.ones(1, 1), (256, 32)))
        assert got[0].tolist() == [values[code & 15] for code in range(256)]
        assert got[1].tolist() == [values[code >> 4] for code in range(256)]


@pytest.mark.usefixtures("exact_dots")
@pytest.mark.parametrize("name", ["plain", "fp8", "int4"])
def test_the_bits_of_a_row_do_not_depend_on_the_batch(name: str):
    weight = random_matrix(name, 64, 64)
    x = torch.randn(130, 64)
    alone = torch.cat([kernel.linear(x[i : i + 1], weight, sections=2) for i in (0, 15, 129)])
    for rows in (16, 17, 33, 130):
        together = kernel.linear(x[-rows:], weight, sections=2)
        assert torch.equal(together[-1], alone[2])
    assert torch.equal(kernel.linear(x, weight, sections=2)[[0, 15, 129]], alone)


@WAYS
@pytest.mark.usefixtures("exact_dots")
@pytest.mark.parametrize("name", ["plain", "fp8", "int4", "nvfp4"])
def test_leaves_give_the_same_bits_for_every_number_of_ranks(way, name: str):
    width, leaves = 384, 8
    weight = random_matrix(name, 40, width)
    x, bias = torch.randn(3, width), torch.randn(40)
    totals = []
    for ranks in (1, 2, 4):
        share = width // ranks
        parts = [
            way.add_leaves(
                way.linear_leaves(
                    x[:, rank * share : (rank + 1) * share],
                    weight.columns(rank * share, (rank + 1) * share),
                    leaves // ranks,
                )
            )
            for rank in range(ranks)
        ]
        totals.append(way.add_leaves(torch.stack(parts), bias))
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])
    close(totals[0], reference.linear(x, weight, bias))


@pytest.mark.parametrize("leaves", [1, 2, 4, 8, 16])
def test_leaves_are_added_as_a_tree(leaves: int):
    partials, bias = torch.randn(leaves, 3, 20), torch.randn(20)
    assert torch.equal(kernel.add_leaves(partials, bias), reference.add_leaves(partials, bias))
    if leaves == 4:
        by_hand = (partials[0] + partials[1]) + (partials[2] + partials[3])
        assert torch.equal(reference.add_leaves(partials), by_hand)


def test_a_result_may_be_written_into_columns_of_a_wider_one():
    x, weight = torch.randn(3, 48), Matrix(torch.randn(20, 48))
    wide = torch.zeros(3, 50)
    kernel.linear(x, weight, out=wide[:, 10:30])
    close(wide[:, 10:30], F.linear(x, weight.codes))
    assert not wide[:, :10].any()
    assert not wide[:, 30:].any()


def test_no_rows_are_no_launch():
    assert kernel.linear(torch.zeros(0, 32), Matrix(torch.zeros(8, 32))).shape == (0, 8)


@WAYS
def test_what_does_not_fit_is_named(way):
    x = torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"x \(2, 32\) must be"):
        way.linear(x, Matrix(torch.zeros(4, 33)))
    with pytest.raises(ValueError, match="needs scales"):
        way.linear(x, Matrix(torch.zeros(4, 16, dtype=torch.uint8), "int4"))
    with pytest.raises(ValueError, match=r"scales are \(4, 2\)"):
        way.linear(x, Matrix(torch.zeros(4, 16, dtype=torch.uint8), "int4", torch.ones(4, 2), (1, 32)))
    with pytest.raises(ValueError, match="3 leaves"):
        way.linear_leaves(x, Matrix(torch.zeros(4, 32)), 3)
