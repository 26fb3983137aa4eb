"""The convolution of DFlash 2 over the rows of draft blocks, against the published code."""

from __future__ import annotations

import pytest
import torch

from kernels.block_conv import kernel, reference

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
LENGTHS = (4, 1, 3)


def a_batch(taps: int, channels: int = 24, group: int = 4):
    """Blocks of four, one and three rows; dynamic weights are half of a projection, as they are in a layer."""
    rows = sum(LENGTHS)
    both = torch.randn(rows, 2, taps, channels // group)
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    return torch.randn(rows, channels), both[:, 1], torch.randn(taps, channels), places


@WAYS
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_it_is_the_published_convolution_of_each_block(way, taps: int):
    published = pytest.importorskip("dflash.model")._grouped_dynamic_convolve
    x, dynamic, base, places = a_batch(taps)
    got = way.convolve_block(x, dynamic, base, places)
    for own, *block in zip(got.split(LENGTHS), x.split(LENGTHS), dynamic.split(LENGTHS)):
        # The published code wants as many rows as taps: rows behind a block change nothing in it.
        rows, weights = (torch.cat([each, torch.ones(taps, *each.shape[1:])])[None] for each in block)
        torch.testing.assert_close(own, published(rows, weights, base, 4)[0, : len(own)])


def test_half_precision_agrees_with_the_reference():
    x, dynamic, base, places = a_batch(taps=2)
    given = x.half(), dynamic.half(), base.half(), places
    torch.testing.assert_close(kernel.convolve_block(*given), reference.convolve_block(*given))


def test_a_row_does_not_depend_on_what_else_is_in_the_launch():
    x, dynamic, base, places = a_batch(taps=2)
    alone = kernel.convolve_block(x[5:], dynamic[5:], base, places[5:])
    assert torch.equal(kernel.convolve_block(x, dynamic, base, places)[5:], alone)


@WAYS
def test_what_does_not_fit_is_refused(way):
    x, dynamic, base, places = a_batch(taps=2)
    for wrong in ((x[:, :23], dynamic, base, places), (x, dynamic, base[:1], places), (x, dynamic, base, places[1:])):
        with pytest.raises(ValueError, match="must be"):
            way.convolve_block(*wrong)
