"""RMSNorm with and without a residual."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.rms_norm import kernel, reference

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


@WAYS
@pytest.mark.parametrize("width", [16, 100])
def test_it_is_torch_rms_norm(way, width: int):
    x, weight = torch.randn(3, width), torch.randn(width)
    normed, total = way.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(normed, F.rms_norm(x, (width,), weight, 1e-6), rtol=1e-5, atol=1e-6)
    assert total is x


@WAYS
def test_the_residual_is_added_first_and_handed_on(way):
    x, residual, weight = torch.randn(3, 20), torch.randn(3, 20), torch.randn(20)
    normed, total = way.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (20,), weight, 1e-5), rtol=1e-5, atol=1e-6)


def test_half_precision_is_rounded_where_the_reference_rounds():
    # not bfloat16: the interpreter cuts it off where a device rounds
    x, residual, weight = torch.randn(3, 64).half(), torch.randn(3, 64).half(), torch.randn(64)
    got = kernel.rms_norm(x, weight, 1e-6, residual)
    want = reference.rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0])


def test_rows_of_a_wider_tensor_may_be_normed():
    wide, weight = torch.randn(3, 40), torch.randn(16)
    got = kernel.rms_norm(wide[:, 8:24], weight, 1e-6)[0]
    torch.testing.assert_close(got, F.rms_norm(wide[:, 8:24], (16,), weight, 1e-6), rtol=1e-5, atol=1e-6)


@WAYS
def test_a_residual_of_another_dtype_is_refused(way):
    with pytest.raises(ValueError, match="residual"):
        way.rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6, torch.zeros(2, 4, dtype=torch.float16))
