"""Multi-head latent attention in its absorbed form only, in sections: see sections.py."""

from __future__ import annotations

from typing import Any

import torch

from modeling.tiles import TiledProduct
from verifier_service.model.kv_cache import LatentsCache
from verifier_service.model.latent_attention import LatentAttention
from verifier_service.model.sections import attend, rows_of
from verifier_service.model.step import Step


class SectionedLatentAttention(LatentAttention):
    """As LatentAttention."""

    def __init__(self, *modules: Any, **shape: Any):
        super().__init__(*modules, **shape)
        self.into_latents = TiledProduct(self.key_up.mT)
        self.from_latents = TiledProduct(self.value_up.mT)

    def _attended(self, content: torch.Tensor, rotary: torch.Tensor, step: Step, cache: LatentsCache) -> torch.Tensor:
        query = torch.cat([self.into_latents(content), rotary.float()], dim=-1)
        seen = query.new_empty(query.shape[1], query.shape[0], self.shape.latent)
        for work in step.works:
            own, start = rows_of(work)
            latents = cache.read(work[-1].blocks)[:, None]
            values = latents[..., : self.shape.latent]
            seen[own] = attend(query[:, own], latents, values, start=start, scaling=self.scaling)
        return self.from_latents(seen.transpose(0, 1)).to(content.dtype)
