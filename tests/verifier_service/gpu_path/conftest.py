"""Kernels run in Triton's interpreter here, as in tests/kernels."""

from __future__ import annotations

from tests.kernels.conftest import _interpreted  # noqa: F401  chooses the interpreter on import
