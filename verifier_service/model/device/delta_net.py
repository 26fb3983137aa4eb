"""Gated DeltaNet over kernels: rows as they lie in the step, states read and written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.delta_inputs.kernel import delta_inputs
from kernels.delta_inputs.reference import DeltaInputs
from kernels.gated_delta.kernel import gated_delta_verify
from kernels.gated_delta_prefill.kernel import gated_delta_prefill
from kernels.gated_norm.kernel import gated_norm
from kernels.short_conv.kernel import short_conv_advance, short_conv_verify
from verifier_service.model.device.states import KernelStates, StateRows
from verifier_service.model.device.step import DeviceStep, PrefillRun
from verifier_service.model.gated_delta_net import RaggedGatedDeltaNet


class KernelGatedDeltaNet(RaggedGatedDeltaNet):
    """As RaggedGatedDeltaNet, but that a verify takes what stands of its slots' last blocks into their states, and that
    prefill chunks of many slots run at once. Their states must be zeroed beforehand if they begin a prompt.
    """

    delta_rule: Callable[..., torch.Tensor] = staticmethod(gated_delta_prefill)  # over tokens that are certain

    def forward(self, x: torch.Tensor, step: DeviceStep, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """[tokens, hidden] -> the same, summed over ranks."""
        assert step.states is not None, "a hybrid model needs recurrent states"
        width = self.heads * self.value_dim
        mixed, gate, b, a = self.in_proj(x).split([self.channels, width, self.heads, self.heads], dim=-1)
        outputs = []
        if step.verify is not None:
            own = slice(step.verify.tokens)
            outputs.append(self._verify_rows(step.states, step.verify, mixed[own], a[own], b[own]))
        for run in step.prefill_runs:
            own = slice(run.parts[0].first, run.parts[-1].stop)
            outputs.append(self._prefill_run(step.states, run, mixed[own], a[own], b[own]))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # [tokens, heads, value_dim]
        output = gated_norm(output, self.norm, self.norm_eps, gate)
        return self.total(self.out_proj(output), self.ranks)

    def _verify_rows(
        self, states: KernelStates, rows: StateRows, mixed: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        layer = self.state_layer
        assert rows.kept is not None, "which of its tokens stand is known in the next step"
        convolved = short_conv_verify(
            *(mixed, self.conv, states.conv[layer], rows.slots, rows.starts, states.kept_mixed[layer], rows.kept)
        )
        inputs = self._inputs(convolved, a, b)
        return gated_delta_verify(
            *(*inputs, states.memory[layer], rows.slots, rows.starts, states.kept(layer), rows.kept)
        )

    def _inputs(self, convolved: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> DeltaInputs:
        return delta_inputs(
            *(convolved, a, b, self.negative_rate, self.dt_bias), key_heads=self.key_heads, key_dim=self.key_dim
        )

    def _prefill_run(
        self, states: KernelStates, run: PrefillRun, mixed: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        """Outputs [tokens, heads, value_dim] of a run's tokens, by which its states advance."""
        layer, slots, starts = self.state_layer, run.rows.slots, run.rows.starts
        convolved = short_conv_advance(mixed, self.conv, states.conv[layer], slots, starts)
        output = self.delta_rule(*self._inputs(convolved, a, b), states.memory[layer], slots, starts)
        for part in run.parts:
            if part.checkpoint >= 0:
                states.save(layer, part.slot, part.checkpoint)
        return output
