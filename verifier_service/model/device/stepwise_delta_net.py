"""Gated DeltaNet over kernels that takes a prompt's tokens as it takes a verify's: one after the other.

Its bits then depend on the tokens before it alone, wherever chunks and drafts begin.
"""

from __future__ import annotations

import torch

from kernels.gated_delta.kernel import gated_delta_advance
from kernels.short_conv.kernel import short_conv_advance
from verifier_service.model.device.delta_net import KernelGatedDeltaNet
from verifier_service.model.device.states import KernelStates
from verifier_service.model.device.step import DeviceStep, PrefillRun


class StepwiseKernelDeltaNet(KernelGatedDeltaNet):
    """As KernelGatedDeltaNet."""

    def _prefills(self, step: DeviceStep, mixed: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        assert step.states is not None, "a hybrid model needs recurrent states"
        outputs = []
        for run in step.prefill_runs:
            own = slice(run.parts[0].first, run.parts[-1].stop)
            outputs.append(self._prefilled(step.states, run, mixed[own], a[own], b[own]))
        return outputs

    def _prefilled(
        self, states: KernelStates, run: PrefillRun, mixed: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        layer = self.state_layer
        for part in run.parts:
            if part.fresh:
                states.conv[layer, part.slot].zero_()
                states.memory[layer, part.slot].zero_()
        slots, starts = run.rows.slots, run.rows.starts
        convolved = short_conv_advance(mixed, self.conv, states.conv[layer], slots, starts)
        output = gated_delta_advance(*self._inputs(convolved, a, b), states.memory[layer], slots, starts)
        for part in run.parts:
            if part.checkpoint >= 0:
                states.save(layer, part.slot, part.checkpoint)
        return output
