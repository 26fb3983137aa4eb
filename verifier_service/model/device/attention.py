"""Attention over kernels: one product for query, key and value; norm, rotation and append in one launch; then the
paged attention of all rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from kernels.kv_append.kernel import rotate_and_append
from kernels.paged_attention.kernel import paged_attention
from modeling.operations import Operations
from modeling.parallel import RowParallelLinear
from modeling.quantized.packed import Weight
from verifier_service.model.device.norm import KernelNorm
from verifier_service.model.device.step import DeviceStep


@dataclass(frozen=True)
class AttentionShape:
    """heads, kv_heads: of this rank. gated: a gate of the query's size follows each query head in its projection."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    window: int | None
    gated: bool


class KernelAttention(nn.Module):
    """Replaces a family's attention of keys and values.

    qkv: query (and gate), key and value projections, one below the other. norms: of each query and key head, or none.
    sinks [heads]: scores that take their share and bring nothing.
    """

    def __init__(
        self,
        qkv: Weight,
        bias: torch.Tensor | None,
        output: RowParallelLinear,
        *,
        layer: int,
        shape: AttentionShape,
        norms: tuple[KernelNorm, KernelNorm] | None,
        sinks: torch.Tensor | None,
        operations: Operations,
    ):
        super().__init__()
        self.qkv, self.output = operations.linear(qkv, bias), output
        self.sigmoid = operations.elementwise(torch.sigmoid)
        self.layer, self.shape, self.norms = layer, shape, norms
        self.sinks = None if sinks is None else nn.Parameter(sinks, requires_grad=False)

    def forward(self, x: torch.Tensor, step: DeviceStep) -> torch.Tensor:
        """[tokens, hidden] -> the same, summed over ranks."""
        shape, norms, cache = self.shape, self.norms, step.caches[self.layer]
        queries = shape.heads * (2 if shape.gated else 1)
        heads = self.qkv(x).view(len(x), -1, shape.head_dim)
        query, key, value = heads.split([queries, shape.kv_heads, shape.kv_heads], dim=1)
        gate = None
        if shape.gated:
            query, gate = query[:, ::2], query[:, 1::2]
        query = rotate_and_append(
            *(query, key, value, step.cos, step.sin, step.cache_rows, cache.keys, cache.values),
            *(cache.key_scales, cache.value_scales),
            query_norm=None if norms is None else norms[0].weight,
            key_norm=None if norms is None else norms[1].weight,
            norm_eps=0.0 if norms is None else norms[0].eps,
        )
        seen = step.attended.over(
            query,
            lambda own, batch: paged_attention(
                *(own, cache.keys, cache.values, batch),
                scaling=shape.scaling,
                sliding_window=shape.window,
                sinks=self.sinks,
                key_scales=cache.key_scales,
                value_scales=cache.value_scales,
                split_tokens=step.attended.section,
                spread=True,
            ),
        )
        if gate is not None:
            seen = seen * self.sigmoid(gate)
        return self.output(seen.flatten(1))
