"""Which operations a service runs: torch's, or the Triton kernels of this repository."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

KernelSetting = Literal["auto", "torch", "triton"]


def wants_triton(kernels: KernelSetting, device: str) -> bool:
    """ "auto" is the kernels on CUDA and torch elsewhere. Raises ValueError where "triton" cannot run.

    On a CPU the kernels run in Triton's interpreter only, which is for tests: thousands of times slower.
    """
    if kernels != "triton":
        return kernels == "auto" and device == "cuda"
    if importlib.util.find_spec("triton") is None:
        raise ValueError("kernels is 'triton' but there is no module triton: install it, or set kernels to 'auto'")
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels is 'triton' but device is {device!r}, where only Triton's interpreter runs them (for tests, with "
            "TRITON_INTERPRET=1 in the environment): set kernels to 'auto', or device to 'cuda'"
        )
    return True
