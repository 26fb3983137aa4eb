"""Gated DeltaNet over kernels that takes a prompt's tokens as it takes a verify's: one after the other.

Its bits then depend on the tokens before it alone, wherever chunks and drafts begin.
"""

from __future__ import annotations

import torch

from verifier_service.model.device.delta_net import KernelGatedDeltaNet
from verifier_service.model.device.step import DeviceStep


class StepwiseKernelDeltaNet(KernelGatedDeltaNet):
    """As KernelGatedDeltaNet. Its states must be stepwise."""

    def _prefills(self, step: DeviceStep, mixed: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        states, rows, layer = step.states, step.prefill_rows, self.state_layer
        assert states is not None, "a hybrid model needs recurrent states"
        assert rows is not None, "prefill has rows"
        for part in step.prefill:
            if part.fresh:
                states.conv[layer, part.slot].zero_()
                states.memory[layer, part.slot].zero_()
        mixed, a, b = (x[step.prefill[0].first :] for x in (mixed, a, b))
        inputs, done = self._run(states, rows, mixed, a, b)
        states.advance_at_once(layer, mixed, inputs, done, rows)
        for part in step.prefill:
            if part.checkpoint >= 0:
                states.save(layer, part.slot, part.checkpoint)
        return [done.output]
