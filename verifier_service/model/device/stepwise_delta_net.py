"""Gated DeltaNet over kernels that takes a prompt's tokens as it takes a verify's: one after the other.

Its bits then depend on the tokens before it alone, wherever chunks and drafts begin.
"""

from __future__ import annotations

from kernels.gated_delta.kernel import gated_delta_advance
from verifier_service.model.device.delta_net import KernelGatedDeltaNet


class StepwiseKernelDeltaNet(KernelGatedDeltaNet):
    """As KernelGatedDeltaNet."""

    delta_rule = staticmethod(gated_delta_advance)
