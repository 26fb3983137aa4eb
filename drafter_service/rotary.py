"""Rotary position embedding of a DFlash checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modeling.dflash_config import DFlashConfig, DraftCheckpointError

STATIC = ("default", "linear", "yarn", "llama3")  # whose frequencies do not depend on the sequence at hand


class Rotary(nn.Module):
    """Callable: (a tensor of the wanted dtype, positions [...] int64) -> cos, sin [..., head_dim]."""

    def __init__(self, config: DFlashConfig, head_dim: int):
        super().__init__()
        # No buffer: `.to(dtype)` would round the frequencies, and with them every angle of a long context.
        self.frequencies, self.scale = _frequencies(config, head_dim)

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.frequencies.device != positions.device:
            self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None] * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(like.dtype), sin.to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., head_dim], each pair (i, i + half) turned by its angle; cos, sin broadcast against x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _frequencies(config: DFlashConfig, head_dim: int) -> tuple[Tensor, float]:
    """float32 [head_dim / 2] on the CPU, and the factor of cos and sin. Raises DraftCheckpointError."""
    raw = config.raw
    parameters: dict[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in STATIC:
        raise DraftCheckpointError(
            f"{config.directory / 'config.json'}: rope_type is {kind!r}; a drafter can have one of {', '.join(STATIC)}"
        )
    if kind == "default":
        theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)
        return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim), 1.0
    # Rare, and seconds of import: only where it is needed.
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    qwen3 = Qwen3Config(**{key: value for key, value in raw.items() if key not in ("architectures", "auto_map")})
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](qwen3, device="cpu")
    return frequencies.float(), float(scale)
