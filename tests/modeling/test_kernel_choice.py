"""Which operations a service runs."""

from __future__ import annotations

import pytest

from modeling.kernel_choice import wants_triton


def test_auto_is_the_kernels_on_cuda_and_torch_elsewhere():
    assert wants_triton("auto", "cuda")
    assert not wants_triton("auto", "cpu")
    assert not wants_triton("torch", "cuda")


def test_the_kernels_on_a_cpu_take_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert wants_triton("triton", "cpu")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="only Triton's interpreter runs them"):
        wants_triton("triton", "cpu")


def test_without_triton_the_cure_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="there is no module triton: install it"):
        wants_triton("triton", "cuda")
