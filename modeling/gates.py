"""How an expert's gate weighs its values: functions of [..., gate and up] -> [...]. May overwrite their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Gate = Callable[[torch.Tensor], torch.Tensor]


def silu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 x width], all gates first -> [..., width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@dataclass(frozen=True)
class ClampedGate:
    """gpt-oss: gate sigmoid(alpha gate) (up + 1), the gate at most `limit`, |up| at most `limit`."""

    alpha: float
    limit: float

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2 x width], all gates first -> [..., width]."""
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp_(max=self.limit)
        return torch.sigmoid(gate * self.alpha).mul_(gate).mul_(up.clamp_(-self.limit, self.limit).add_(1))
