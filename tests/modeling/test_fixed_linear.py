"""A prepacked linear layer is a linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modeling import fixed_linear as module
from modeling.fixed_linear import fixed_linear


@pytest.fixture(autouse=True)
def small_weights_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKED_FROM", {})


@pytest.mark.parametrize("packable", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 8, 200])
def test_it_computes_what_torch_computes(
    monkeypatch: pytest.MonkeyPatch, packable: bool, with_bias: bool, rows: int
) -> None:
    if not packable:
        monkeypatch.setattr(module, "_packable", lambda weight: False)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 32), torch.randn(48) if with_bias else None, torch.randn(rows, 32)
    with torch.inference_mode():
        torch.testing.assert_close(fixed_linear(weight, bias)(x), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


def test_it_takes_more_dimensions_and_slices() -> None:
    weight, x = torch.randn(48, 32), torch.randn(2, 5, 64)
    with torch.inference_mode():
        multiply = fixed_linear(weight)
        for each in (x[..., :32], x[0, :, 32:], x.transpose(0, 1)[..., :32]):
            torch.testing.assert_close(multiply(each), F.linear(each, weight), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype: torch.dtype) -> None:
    weight, x = torch.randn(48, 32).to(dtype), torch.randn(8, 32).to(dtype)
    with torch.inference_mode():
        out = fixed_linear(weight)(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), F.linear(x.float(), weight.float()), atol=0.1, rtol=0.05)


def test_parameters_need_no_gradient_any_more() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    with torch.inference_mode():
        right = F.linear(torch.eye(4), weight)
        multiply = fixed_linear(weight)
        assert not multiply(torch.eye(4)).requires_grad
        torch.testing.assert_close(multiply(torch.eye(4)), right)
