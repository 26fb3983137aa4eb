"""Kernels run in Triton's interpreter here, which has to be chosen before triton and the kernels are imported."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def _import_interpreted() -> None:
    # Another folder's tests may have imported triton already (transformers does), to compile and not to interpret. Its
    # own library of device functions stays that way for good, so forget those modules; the C extension loads only once.
    for name in list(sys.modules):
        if name.partition(".")[0] in ("triton", "kernels") and not name.startswith("triton._C"):
            del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:  # processes started by other tests choose for themselves
        patch.setenv("TRITON_INTERPRET", "1")
        for file in sorted(KERNELS.glob("*/kernel.py")):
            importlib.import_module(f"kernels.{file.parent.name}.kernel")


if os.environ.get("TRITON_INTERPRET") != "1" or "triton" not in sys.modules:
    _import_interpreted()


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch):
    """The interpreter, one thread, and the same random numbers whatever ran before."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
