"""Multi-head latent attention in the shapes of DeepSeek-V3 and Kimi-K2.5: latents of 512, rotary keys of 64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from kernels.expanded_attention import kernel as expanded_attention
from kernels.expanded_attention import reference as expanded_attention_reference
from kernels.expanded_attention.batch import ChunkBatch, empty_sums
from kernels.latent_append import kernel as latent_append
from kernels.latent_append import reference as latent_append_reference
from kernels.latent_attention import kernel as latent_attention
from kernels.latent_attention import reference as latent_attention_reference
from kernels.paged_attention import kernel as paged_attention
from kernels.paged_attention import reference as paged_attention_reference
from kernels.paged_batch import PagedBatch
from tests.gpu.case import Call, Case, Machine

LATENT, ROTARY = 512, 64
CONTENT, VALUE = 128, 128


def latent_cases(machine: Machine) -> Iterator[Case]:
    small = machine.shrink
    for requests, rows, context, heads, split, fp8 in (
        (16, 16, 32_768, 8, None, False),  # a rank of 8
        (16, 16, 32_768, 64, None, False),
        (1, 16, 32_768, 64, 1024, False),
        (64, 1, 2048, 8, None, False),
        (16, 16, 32_768, 8, None, True),
        (1, 512, 4096, 64, None, False),
    ):
        shape = max(1, requests // small), max(1, rows // small), max(64, context // small), max(2, heads // small)
        yield _attention(machine, *shape, split=None if split is None else max(32, split // small), fp8=fp8)
    yield _expanded(machine, rows=max(1, 2048 // small), context=max(64, 8192 // small), heads=max(2, 8 // small))
    for rows, context, heads, fp8 in (
        (2048, 2048, 64, False),
        (2048, 16_384, 64, False),
        (2048, 32_768, 8, False),  # a rank of 8
        (512, 16_384, 64, True),
    ):
        section = max(48, (1 << 18) // heads // small)
        sizes = max(1, rows // small), max(64, context // small // (1 if small == 1 else 4)), max(2, heads // small)
        yield _expanding(machine, *sizes, section=section, fp8=fp8)
    for fp8 in (False, True):
        yield _append(machine, tokens=max(1, 1024 // small), heads=64, fp8=fp8)


def _attention(
    machine: Machine, requests: int, rows: int, context: int, heads: int, *, split: int | None, fp8: bool
) -> Case:
    block_tokens, blocks = 64, -(-context // 64)
    query = machine.normal(requests * rows, heads, LATENT + ROTARY)
    cache = machine.normal(requests * blocks, block_tokens, LATENT + ROTARY)
    latents, keys = cache.split([LATENT, ROTARY], dim=-1)
    options: dict[str, Any] = {"scaling": (LATENT + ROTARY) ** -0.5, "split_tokens": split}
    if fp8:
        latents, keys = latents.to(torch.float8_e4m3fn), keys.contiguous()
        options["scales"] = torch.ones(cache.shape[:2], dtype=torch.bfloat16, device=machine.device)
    tables = torch.randperm(requests * blocks, device=machine.device).int().view(requests, blocks)
    starts = machine.ints([rows * request for request in range(requests + 1)])
    batch = PagedBatch(tables, starts, machine.ints([context] * requests), context)
    token = LATENT * latents.itemsize + ROTARY * keys.itemsize + (2 if fp8 else 0)
    suffix = (f" split {split}" if split else "") + (" fp8" if fp8 else "")
    return Case(
        f"latent_attention {requests} x {rows} rows, context {context}, {heads} heads{suffix}",
        lambda: latent_attention.latent_attention(query, latents, keys, batch, spread=True, **options),
        lambda: latent_attention_reference.latent_attention(query, latents, keys, batch, **options),
        moved=query.nbytes + query.nbytes * LATENT // (LATENT + ROTARY) + requests * context * token,
        flops=2 * requests * rows * heads * (context - rows // 2) * (2 * LATENT + ROTARY),
        library=None if fp8 else _torch_attention(query, cache, requests, context, options["scaling"]),
    )


def _torch_attention(query: torch.Tensor, cache: torch.Tensor, requests: int, context: int, scaling: float) -> Call:
    """torch's attention with each request's latents side by side, all heads and rows as rows of one KV head."""
    rows, heads, width = query.shape[0] // requests, *query.shape[1:]
    keys = cache.view(requests, 1, -1, width)[:, :, :context]
    packed = query.view(requests, 1, rows * heads, width)
    at = torch.arange(context, device=query.device)
    mask = (at <= at[context - rows :, None]).repeat_interleave(heads, 0)
    return lambda: F.scaled_dot_product_attention(packed, keys, keys[..., :LATENT], mask, scale=scaling)


def _expanded(machine: Machine, rows: int, context: int, heads: int) -> Case:
    """A prefill chunk of one request over keys and values made of its latents: 192 and 128 wide, each head its own."""
    query, keys = machine.normal(rows, heads, 192), machine.normal(context // 64, 64, heads, 192)
    values = machine.normal(context // 64, 64, heads, 128)
    tables = machine.ints(torch.arange(context // 64)).view(1, -1)
    batch = PagedBatch(tables, machine.ints([0, rows]), machine.ints([context]), context)
    flat = [x.flatten(0, 1).transpose(0, 1) for x in (keys, values)]
    mask = torch.arange(context, device=machine.device)
    mask = mask <= mask[context - rows :, None]
    return Case(
        f"paged_attention 1 x {rows} rows, context {context}, heads {heads}/{heads} x 192 and 128",
        lambda: paged_attention.paged_attention(query, keys, values, batch, scaling=192**-0.5),
        lambda: paged_attention_reference.paged_attention(query, keys, values, batch, scaling=192**-0.5),
        moved=query.nbytes * 5 // 3 + keys.nbytes + values.nbytes,
        flops=2 * rows * heads * (context - rows // 2) * (192 + 128),
        library=lambda: F.scaled_dot_product_attention(query.transpose(0, 1), flat[0], flat[1], mask, scale=192**-0.5),
    )


def _expanding(machine: Machine, rows: int, context: int, heads: int, *, section: int, fp8: bool) -> Case:
    """The same from latents in a paged cache, as the verifier does it: copied, expanded and attended to by sections."""
    content, rotary = machine.normal(rows, heads, CONTENT), machine.normal(rows, heads, ROTARY)
    latents, keys = machine.normal(context // 64, 64, LATENT + ROTARY).split([LATENT, ROTARY], dim=-1)
    scales = None
    if fp8:
        latents, keys = latents.to(torch.float8_e4m3fn), keys.contiguous()
        scales = torch.ones(latents.shape[:2], dtype=torch.bfloat16, device=machine.device)
    up = machine.normal(heads * (CONTENT + VALUE), LATENT) * LATENT**-0.5
    tables = machine.ints(torch.randperm(context // 64)).view(1, -1)
    batch = ChunkBatch(machine.ints([0, rows]), machine.ints([0, context]))

    def call(way: Any) -> torch.Tensor:
        output = content.new_empty(rows, heads, VALUE)
        sums = empty_sums(rows, heads, VALUE, content.device)
        for first in range(0, context, section):
            count = min(section, context - first)
            own = content.new_empty(count, LATENT), content.new_empty(count, ROTARY)
            way.copy_section(latents, keys, tables, batch.context_starts, own, first=first, scales=scales)
            expanded = (own[0] @ up.t()).view(count, heads, -1)
            given = content, rotary, expanded, own[1], batch, output, sums
            way.attend_section(*given, first=first, scaling=(CONTENT + ROTARY) ** -0.5)
        return output

    pairs = rows * (context - rows // 2)
    return Case(
        f"expanded latents, {rows} rows, context {context}, {heads} heads{' fp8' if fp8 else ''}",
        lambda: call(expanded_attention),
        lambda: call(expanded_attention_reference),
        moved=context * (LATENT * latents.itemsize + ROTARY * keys.itemsize) + content.nbytes * 5 // 2,
        flops=2 * heads * (pairs * (CONTENT + ROTARY + VALUE) + context * LATENT * (CONTENT + VALUE)),
    )


def _append(machine: Machine, tokens: int, heads: int, fp8: bool) -> Case:
    """fp8: of latents that normalise to what it holds without rounding, which Triton's interpreter gets wrong."""
    compressed, query = machine.normal(tokens, LATENT + ROTARY), machine.normal(tokens, heads, ROTARY)
    weight = torch.rand(LATENT, device=machine.device).to(machine.dtype)
    if fp8:
        compressed[:, :LATENT], weight = compressed[:, :LATENT].sign(), torch.ones_like(weight)
    angles = torch.rand(tokens, ROTARY // 2, device=machine.device).repeat(1, 2) * 7
    shape = (tokens + 1, 16)
    stored = torch.float8_e4m3fn if fp8 else machine.dtype
    caches = [
        [
            torch.zeros(*shape, LATENT, device=machine.device).to(stored),
            torch.zeros(*shape, ROTARY, device=machine.device, dtype=machine.dtype),
            *([torch.zeros(shape, device=machine.device, dtype=torch.bfloat16)] if fp8 else []),
        ]
        for _ in range(2)
    ]
    rows = machine.ints(torch.randperm(16 * tokens)[:tokens], torch.int64)

    def call(way: Any, own: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        eps = 0.0 if fp8 else 1e-6
        step = compressed, weight, eps, query, angles.cos(), angles.sin(), rows
        return way.append_latents(*step, *own, interleaved=True), *own

    return Case(
        f"append_latents {tokens} tokens, {heads} heads{' fp8' if fp8 else ''}",
        lambda: call(latent_append, caches[0]),
        lambda: call(latent_append_reference, caches[1]),
        moved=compressed.nbytes + tokens * (LATENT * stored.itemsize + ROTARY * compressed.itemsize) + 2 * query.nbytes,
    )
