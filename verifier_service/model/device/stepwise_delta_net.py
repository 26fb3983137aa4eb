"""Gated DeltaNet over kernels that takes a prompt's tokens as it takes a verify's: one after the other.

Its bits then depend on the tokens before it alone, wherever chunks and drafts begin.
"""

from __future__ import annotations

import torch

from verifier_service.model.device.delta_net import KernelGatedDeltaNet
from verifier_service.model.device.states import KernelStates
from verifier_service.model.device.step import DeviceStep, PrefillRun


class StepwiseKernelDeltaNet(KernelGatedDeltaNet):
    """As KernelGatedDeltaNet. Its states must be stepwise."""

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
        inputs, done = self._run(states, run.rows, mixed, a, b)
        states.advance_at_once(layer, mixed, inputs, done, run.rows)
        for part in run.parts:
            if part.checkpoint >= 0:
                states.save(layer, part.slot, part.checkpoint)
        return done.output
