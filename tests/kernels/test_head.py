"""The target's output head: logits that are never rounded, and tokens that are taken without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.acceptance import kernel as acceptance
from kernels.acceptance.reference import uniform
from kernels.head import kernel, reference
from kernels.head.tile import head_tile
from kernels.linear.matrix import Matrix
from tests.kernels.products import FORMATS, close, random_matrix, sum_products_in_order
from verifier_service.sampling.race import row_keys

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


Race = tuple[torch.Tensor, Matrix, torch.Tensor, torch.Tensor]


def a_race(rows: int, width: int = 40, vocabulary: int = 150) -> Race:
    """Every other row is greedy."""
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width) / 3
    keys = row_keys(torch.arange(rows) - 3, torch.arange(rows) % 2, torch.arange(rows) + 9)
    temperatures = torch.tensor([0.7, 0.0, 1.0, 0.0, 2.5, 0.0, 0.01, 0.0], dtype=torch.float64)
    return hidden, Matrix(weight), keys, temperatures.repeat(-(-rows // 8))[:rows]


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 150), (20, 70), (33, 64), (70, 130)])
def test_the_token_is_the_one_taken_from_the_logits_in_every_row_tile(rows: int, vocabulary: int):
    hidden, weight, *params = a_race(rows, vocabulary=vocabulary)
    got = kernel.head_race(hidden, weight, *params)
    from_logits = acceptance.sample(kernel.head_logits(hidden, weight), *params)
    assert torch.equal(got[0], from_logits[0])
    assert torch.equal(got[1], from_logits[1]), "scores to the last bit"
    assert torch.equal(got[0], reference.head_race(hidden, weight, *params)[0])


@pytest.mark.parametrize("label", ["plain", *FORMATS])
def test_weights_of_every_format_have_the_logits_of_their_numbers(label: str):
    hidden, weight = torch.randn(5, 256), random_matrix(label, 80, 256)
    logits = kernel.head_logits(hidden, weight)
    assert logits.dtype == torch.float32
    close(logits, reference.head_logits(hidden, weight))
    params = a_race(5)[2:]
    assert torch.equal(kernel.head_race(hidden, weight, *params)[0], acceptance.sample(logits, *params)[0])


def test_logits_of_half_precision_are_not_rounded_to_it():
    hidden, weight = torch.randn(3, 40).half(), Matrix(torch.randn(70, 40).half())
    got = kernel.head_logits(hidden, weight)
    assert not torch.equal(got, got.half().float())
    close(got, hidden.float() @ weight.codes.float().t())


def test_a_row_has_the_same_bits_alone_and_beside_others_and_a_token_in_every_shard(monkeypatch: pytest.MonkeyPatch):
    sum_products_in_order(monkeypatch)
    hidden, weight, keys, temperatures = a_race(70, width=130)
    logits = kernel.head_logits(hidden, weight)
    scores = kernel.head_race(hidden, weight, keys, temperatures)[1]
    assert head_tile(70, weight, hidden.dtype).rows > head_tile(17, weight, hidden.dtype).rows
    for own in (slice(4, 5), slice(6, 23)):
        assert torch.equal(kernel.head_logits(hidden[own], weight), logits[own])
        alone = kernel.head_race(hidden[own], weight, keys[own], temperatures[own])[1]
        assert torch.equal(alone, scores[own])
    assert torch.equal(kernel.head_logits(hidden[:3], weight.rows(37, 150)), logits[:3, 37:])


def test_shards_of_the_vocabulary_join_to_the_whole():
    hidden, weight, *params = a_race(8)
    whole = reference.head_race(hidden, weight, *params)
    parts = [kernel.head_race(hidden, weight.rows(a, b), *params, first_token=a) for a, b in ((0, 60), (60, 150))]
    ids, scores = (torch.stack(each) for each in zip(*parts))
    assert torch.equal(acceptance.join(ids, scores)[0], whole[0])


@WAYS
def test_the_lowest_of_equal_logits_is_the_greedy_token(way: Any):
    """Also where a tile holds nothing but equals."""
    weight = torch.zeros(200, 16)
    weight[[150, 100, 70, 71]] = 1.0
    zero = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    hidden = torch.stack([torch.ones(16), torch.zeros(16)])
    assert way.head_race(hidden, Matrix(weight), zero[1], zero[0])[0].tolist() == [70, 0]


@WAYS
def test_equal_logits_are_decided_by_the_noise(way: Any):
    hidden, weight, keys, _ = a_race(4, vocabulary=70)
    got = way.head_race(torch.zeros_like(hidden), weight, keys, torch.ones(4, dtype=torch.float64))[0]
    assert torch.equal(got, uniform(keys[:, None], torch.arange(70)).argmax(-1))


@WAYS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_yield_no_token_and_harm_no_other_row(way: Any, temperature: float):
    hidden, weight, keys, _ = a_race(3)
    temperatures = torch.full((3,), temperature, dtype=torch.float64)
    want = way.head_race(hidden, weight, keys, temperatures)[0]
    hidden[0, 2] = float("nan")
    assert way.head_race(hidden, weight, keys, temperatures)[0].tolist() == [-1, *want[1:].tolist()]
    weight.codes[3] = float("inf")
    assert way.head_race(hidden.abs(), weight, keys, temperatures)[0].tolist() == [-1] * 3


def test_tokens_whose_scores_float32_cannot_tell_apart_are_weighed_exactly():
    """Scores of ten million and the noise, where float32 has whole numbers only."""
    hidden, weight = torch.ones(64, 8), Matrix(torch.full((130, 8), 125.0) + torch.rand(130, 8) * 1e-4)
    keys, temperatures = torch.arange(64) * 77, torch.full((64,), 1e-4, dtype=torch.float64)
    got = kernel.head_race(hidden, weight, keys, temperatures)
    want = acceptance.sample(kernel.head_logits(hidden, weight), keys, temperatures)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"x \(2, 8\) must be \[rows, in\]"):
        kernel.head_race(torch.zeros(2, 8), Matrix(torch.zeros(9, 7)), *a_race(2)[2:])
    with pytest.raises(ValueError, match=r"must be \[2\]"):
        kernel.head_race(torch.zeros(2, 8), Matrix(torch.zeros(9, 8)), *a_race(3)[2:])
