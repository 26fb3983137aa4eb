"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over ragged batches and a paged cache of latents.

A token's keys and values of all heads are linear maps of one latent vector c: k_h = [U_h c, r], v_h = V_h c, with a
rotary key r that all heads share. The cache holds c and r. There are two ways to attend, equal in exact arithmetic:

absorbed: as q_h . U_h c = (U_h^T q_h) . c, queries are mapped into latent space, all heads read the latents as they
    lie in the cache, and V_h maps what they saw. Nothing is made per token of context: right for few rows.
expanded: every head's keys and values are made of the latents, once for all rows of a chunk. A pair of row and token
    then costs content + rotary + value multiplications instead of 2 x latent + rotary: right for many rows.
"""

from __future__ import annotations

from itertools import chain, groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from verifier_service.model.kv_cache import LatentsCache
from verifier_service.model.latent_shape import LatentShape
from verifier_service.model.step import Segment, Step

ENTRIES = 1 << 25  # of scores, or of keys and values, that exist at once: bounds the memory of a long context


class LatentAttention(nn.Module):
    """Replaces transformers' DeepseekV3Attention; this layer's latents are step.latents[layer].

    query: hidden -> [tokens, heads x (content + rotary)], for the heads of this rank. compress: hidden -> [tokens,
    latent + rotary], the same on every rank; norm: of its latent. up [heads x (content + value), latent]: this rank's
    part of kv_b_proj. output: [tokens, heads x value] -> hidden, summed over ranks. interleaved: the two entries of a
    rotary pair are neighbours.
    """

    key_up: torch.Tensor
    value_up: torch.Tensor

    def __init__(
        self,
        query: nn.Module,
        compress: nn.Module,
        norm: nn.Module,
        up: torch.Tensor,
        output: nn.Module,
        *,
        layer: int,
        shape: LatentShape,
        scaling: float,
        interleaved: bool,
    ):
        super().__init__()
        self.query, self.compress, self.norm, self.output = query, compress, norm, output
        self.layer, self.shape, self.scaling, self.interleaved = layer, shape, scaling, interleaved
        keys, values = up.view(shape.heads, -1, shape.latent).split([shape.content, shape.value], dim=1)
        self.key_up = nn.Parameter(keys.contiguous(), requires_grad=False)  # [heads, content, latent]
        self.value_up = nn.Parameter(values.mT.contiguous(), requires_grad=False)  # [heads, latent, value]

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        step: Step,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, tokens, hidden] -> the same, summed over ranks."""
        x, shape = hidden_states[0], self.shape
        content, rotary = self.query(x).view(len(x), shape.heads, -1).split([shape.content, shape.rotary], dim=-1)
        latent, key = self.compress(x).split([shape.latent, shape.rotary], dim=-1)
        turned = self._rotate(torch.cat([rotary, key[:, None]], dim=1), *position_embeddings)
        cache = step.latents[self.layer]
        cache.write(step.kv_rows, torch.cat([self.norm(latent), turned[:, -1]], dim=-1))
        output = self._attended(content.transpose(0, 1), turned[:, :-1].transpose(0, 1), step, cache)
        return self.output(output.transpose(0, 1).reshape(len(x), -1))[None], None

    def _attended(self, content: torch.Tensor, rotary: torch.Tensor, step: Step, cache: LatentsCache) -> torch.Tensor:
        """Queries' content and rotary parts [heads, tokens, width] -> [heads, tokens, value]."""
        outputs = []
        for expand, works in groupby(step.works, self._expands):
            if expand:
                outputs += [self._expanded(content, rotary, work, cache) for work in works]
            else:
                outputs.append(self._absorbed(content, rotary, list(chain(*works)), cache))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [tokens, heads, rotary]; cos, sin [1, tokens, rotary], the same in both halves."""
        half = self.shape.rotary // 2
        cos, sin = cos[0, :, None, :half], sin[0, :, None, :half]
        first, second = (x[..., 0::2], x[..., 1::2]) if self.interleaved else x.split(half, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _expands(self, work: tuple[Segment, ...]) -> bool:
        return self.shape.expands(work[-1].stop - work[0].first, work[-1].context)

    def _absorbed(
        self, content: torch.Tensor, rotary: torch.Tensor, segments: list[Segment], cache: LatentsCache
    ) -> torch.Tensor:
        """content, rotary [heads, tokens, width] -> [heads, rows, value] of the segments' consecutive rows."""
        base = segments[0].first
        own = slice(base, segments[-1].stop)
        query = torch.cat([torch.bmm(content[:, own], self.key_up), rotary[:, own]], dim=-1).mul_(self.scaling)
        seen = [
            self._look(
                query[:, segment.first - base : segment.stop - base],
                cache.read(segment.blocks)[: segment.context],
                segment.bias,
            )
            for segment in segments
        ]
        return torch.bmm(seen[0] if len(seen) == 1 else torch.cat(seen, dim=1), self.value_up)

    def _look(self, query: torch.Tensor, latents: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """query [heads, rows, latent + rotary], scaled, over latents [context, the same] -> [heads, rows, latent].

        Written out: torch's fused attention wants values as wide as keys, which would be one more copy.
        """
        heads, rows, width = query.shape
        share = max(1, ENTRIES // (rows * len(latents)))
        if heads > share:
            return torch.cat([self._look(part, latents, bias) for part in query.split(share)])
        scores = torch.mm(query.reshape(-1, width), latents.t())
        if bias is not None:
            scores.view(heads, rows, -1).add_(bias)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        return torch.mm(weights, latents[:, : self.shape.latent]).view(heads, rows, -1)

    def _expanded(
        self, content: torch.Tensor, rotary: torch.Tensor, work: tuple[Segment, ...], cache: LatentsCache
    ) -> torch.Tensor:
        """content, rotary [heads, tokens, width] -> [heads, rows, value] of one chunk's rows."""
        shape, context = self.shape, work[-1].context
        latents, key = cache.read(work[-1].blocks)[:context].split([shape.latent, shape.rotary], dim=-1)
        query = torch.cat([content, rotary], dim=-1)
        width = shape.content + shape.rotary
        outputs = []
        for heads in _runs(shape.heads, ENTRIES // (context * 2 * width)):
            key_up, value_up = self.key_up[heads], self.value_up[heads]
            shared = latents.expand(len(key_up), -1, -1)
            keys = torch.cat([torch.bmm(shared, key_up.mT), key.expand(len(key_up), -1, -1)], dim=-1)
            # As wide as the keys, for then torch's fused attention takes them.
            values = F.pad(torch.bmm(shared, value_up), (0, width - shape.value))
            rows = [
                F.scaled_dot_product_attention(
                    query[None, heads, segment.first : segment.stop],
                    keys[None, :, : segment.context],
                    values[None, :, : segment.context],
                    segment.bias,
                    scale=self.scaling,
                )[0, ..., : shape.value]
                for segment in work
            ]
            outputs.append(torch.cat(rows, dim=1))
        return torch.cat(outputs)


def _runs(count: int, longest: int) -> list[slice]:
    step = max(1, longest)
    return [slice(first, first + step) for first in range(0, count, step)]
