"""Multi-head latent attention over kernels, in absorbed form for every row (see model/latent_attention.py).

A long prefill chunk costs more multiplications this way than expanded; it keeps one path, and reads what is cached.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from kernels.latent_append.kernel import append_latents
from kernels.latent_attention.kernel import latent_attention
from verifier_service.model.device.norm import KernelNorm
from verifier_service.model.device.step import DeviceStep
from verifier_service.model.latent_attention import LatentAttention


class KernelLatentAttention(LatentAttention):
    """As LatentAttention, its `norm` a KernelNorm."""

    def forward(self, x: torch.Tensor, step: DeviceStep, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """[tokens, hidden] -> the same, summed over ranks."""
        shape, cache, norm = self.shape, step.latents[self.layer], cast(KernelNorm, self.norm)
        content, rotary = self.query(x).view(len(x), shape.heads, -1).split([shape.content, shape.rotary], dim=-1)
        query = x.new_empty(len(x), shape.heads, shape.cached)
        torch.bmm(content.transpose(0, 1), self.key_up, out=query[..., : shape.latent].transpose(0, 1))
        append_latents(
            *(self.compress(x), norm.weight, norm.eps, rotary, step.cos, step.sin, step.cache_rows),
            *(cache.latents, cache.rotary, cache.scales),
            interleaved=self.interleaved,
            output=query[..., shape.latent :],
        )
        seen = latent_attention(
            *(query, cache.latents, cache.rotary, step.batch),
            scaling=self.scaling,
            scales=cache.scales,
            split_tokens=step.section,
        )
        output = torch.bmm(seen.transpose(0, 1), self.value_up)  # [heads, tokens, value]
        return self.output(output.transpose(0, 1).reshape(len(x), -1))
