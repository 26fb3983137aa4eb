"""Multi-head latent attention over kernels: long chunks in expanded form, everything else in absorbed form.

The contexts of expanded chunks, side by side in thought, are gone through section by section: a section's latents are
copied out of the cache, one product makes every head's keys and values of them, and the chunks' rows attend to those.
The memory this takes does not depend on contexts (LatentShape.workspace_bytes), and all of it is taken every time, so
that whoever measures one step knows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kernels.expanded_attention.batch import empty_sums
from kernels.expanded_attention.kernel import attend_section, copy_section
from verifier_service.model.device.latent_attention import KernelLatentAttention
from verifier_service.model.device.latent_runs import AbsorbedRun, ExpandedRun
from verifier_service.model.device.step import DeviceStep, LatentTensors


class ExpandingLatentAttention(KernelLatentAttention):
    """As KernelLatentAttention."""

    def __init__(self, *modules: Any, **shape: Any):
        super().__init__(*modules, **shape)
        up = torch.cat([self.key_up, self.value_up.mT], dim=1)  # [heads, content + value, latent]
        del self.key_up, self.value_up
        self.up = nn.Parameter(up, requires_grad=False)
        self.key_up, self.value_up = up[:, : self.shape.content], up[:, self.shape.content :].mT

    def forward(self, x: torch.Tensor, step: DeviceStep, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """[tokens, hidden] -> the same, summed over ranks."""
        if not step.latent_runs:
            return super().forward(x, step)
        shape, cache = self.shape, step.latents[self.layer]
        content, rotary = self._projected(x)
        turned = x.new_empty(rotary.shape)
        self._append(x, rotary, step, turned)
        seen = x.new_empty(len(x), shape.heads, shape.value)
        for run in step.latent_runs:
            own = run.rows
            if isinstance(run, ExpandedRun):
                self._expand(content[own], turned[own], run, cache, seen[own])
            else:
                seen[own] = self._absorb(content[own], turned[own], run, cache)
        return self.output(seen.flatten(1))

    def expands(self, rows: int, context: int) -> bool:
        return self.shape.expands(rows, context)

    def _absorb(
        self, content: torch.Tensor, turned: torch.Tensor, run: AbsorbedRun, cache: LatentTensors
    ) -> torch.Tensor:
        query = content.new_empty(*content.shape[:2], self.shape.cached)
        self._into_latents(content, query[..., : self.shape.latent])
        query[..., self.shape.latent :] = turned
        return self._look_at_latents(query, run.attended, cache)

    def _expand(
        self, content: torch.Tensor, turned: torch.Tensor, run: ExpandedRun, cache: LatentTensors, seen: torch.Tensor
    ) -> None:
        """content, turned [rows, heads, width] -> seen [rows, heads, value]."""
        shape = self.shape
        latents, keys = content.new_empty(shape.section, shape.latent), content.new_empty(shape.section, shape.rotary)
        expanded = content.new_empty(shape.section, shape.heads * (shape.content + shape.value))
        sums = empty_sums(len(content), shape.heads, shape.value, content.device)
        for first in range(0, run.places, shape.section):
            own = slice(0, min(shape.section, run.places - first))
            copy_section(
                *(cache.latents, cache.rotary, run.tables, run.batch.context_starts, (latents[own], keys[own])),
                first=first,
                scales=cache.scales,
            )
            torch.mm(latents[own], self.up.flatten(0, 1).t(), out=expanded[own])
            attend_section(
                *(content, turned, expanded[own].unflatten(1, (shape.heads, -1)), keys[own], run.batch, seen, sums),
                first=first,
                scaling=self.scaling,
            )
