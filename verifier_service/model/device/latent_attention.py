"""Multi-head latent attention over kernels, in absorbed form (see model/latent_attention.py)."""

from __future__ import annotations

from typing import Any, cast

import torch

from kernels.latent_append.kernel import append_latents
from kernels.latent_attention.kernel import latent_attention
from modeling.kernel_heads import TritonHeadProducts
from verifier_service.model.device.attended import Attended
from verifier_service.model.device.norm import KernelNorm
from verifier_service.model.device.step import DeviceStep, LatentTensors
from verifier_service.model.latent_attention import LatentAttention


class KernelLatentAttention(LatentAttention):
    """As LatentAttention, its `norm` a KernelNorm."""

    def forward(self, x: torch.Tensor, step: DeviceStep, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """[tokens, hidden] -> the same, summed over ranks."""
        content, rotary = self._projected(x)
        query = x.new_empty(len(x), self.shape.heads, self.shape.cached)
        self._into_latents(content, query[..., : self.shape.latent])
        self._append(x, rotary, step, query[..., self.shape.latent :])
        seen = self._look_at_latents(query, step.attended, step.latents[self.layer])
        return self.output(seen.reshape(len(x), -1))

    def expands(self, rows: int, context: int) -> bool:
        """Whether so many rows of a chunk over so many tokens attend in expanded form."""
        return False

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries' content and rotary parts [tokens, heads, width]."""
        shape = self.shape
        return self.query(x).view(len(x), shape.heads, -1).split([shape.content, shape.rotary], dim=-1)

    def _append(self, x: torch.Tensor, rotary: torch.Tensor, step: DeviceStep, turned: torch.Tensor) -> None:
        """Latents and rotary keys go into the cache, `rotary` with its positions into `turned`."""
        cache, norm = step.latents[self.layer], cast(KernelNorm, self.norm)
        append_latents(
            *(self.compress(x), norm.weight, norm.eps, rotary, step.cos, step.sin, step.cache_rows),
            *(cache.latents, cache.rotary, cache.scales),
            interleaved=self.interleaved,
            output=turned,
        )

    def _look_at_latents(self, query: torch.Tensor, attended: Attended, cache: LatentTensors) -> torch.Tensor:
        """query [rows, heads, latent + rotary] -> [rows, heads, value]."""
        seen = attended.over(
            query,
            lambda own, batch: latent_attention(
                *(own, cache.latents, cache.rotary, batch),
                scaling=self.scaling,
                scales=cache.scales,
                split_tokens=attended.section,
                spread=True,
            ),
        )
        return self._from_latents(seen)

    def _into_latents(self, content: torch.Tensor, out: torch.Tensor) -> None:
        """content [tokens, heads, content] -> out [tokens, heads, latent]."""
        torch.bmm(content.transpose(0, 1), self.key_up, out=out.transpose(0, 1))

    def _from_latents(self, seen: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, latent] -> [tokens, heads, value]."""
        return torch.bmm(seen.transpose(0, 1), self.value_up).transpose(0, 1)


class TiledKernelLatentAttention(KernelLatentAttention):
    """As KernelLatentAttention, its maps by kernels that know nothing of the batch."""

    def __init__(self, *modules: Any, **shape: Any):
        super().__init__(*modules, **shape)
        self.into, self.back = (TritonHeadProducts(up.mT.contiguous()) for up in (self.key_up, self.value_up))
        del self.key_up, self.value_up

    def _into_latents(self, content: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self.into(content))

    def _from_latents(self, seen: torch.Tensor) -> torch.Tensor:
        return self.back(seen)
