"""What is checked and measured on a GPU: every kernel in serving shapes, as random tensors and calls to compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from kernels.acceptance import kernel as acceptance
from kernels.acceptance import reference as acceptance_reference
from kernels.draft_head import kernel as draft_head
from kernels.draft_head import reference as draft_head_reference
from kernels.gated_delta import kernel as gated_delta
from kernels.gated_delta import reference as gated_delta_reference
from kernels.kept_rows import KeptRows
from kernels.kv_append import kernel as kv_append
from kernels.kv_append import reference as kv_append_reference
from kernels.paged_attention import kernel as paged_attention
from kernels.paged_attention import reference as paged_attention_reference
from kernels.paged_batch import PagedBatch
from kernels.rms_norm import kernel as rms_norm
from kernels.rms_norm import reference as rms_norm_reference
from kernels.short_conv import kernel as short_conv
from kernels.short_conv import reference as short_conv_reference
from tests.gpu.case import Call, Case, Machine
from tests.gpu.cases_drafter import drafter_cases
from tests.gpu.cases_gates import gate_cases
from tests.gpu.cases_head import head_cases
from tests.gpu.cases_latent import latent_cases
from tests.gpu.cases_linear import linear_cases
from tests.gpu.cases_moe import moe_cases
from tests.gpu.cases_prefill import prefill_cases
from tests.gpu.cases_truncation import truncation_cases


def cases(machine: Machine) -> Iterator[Case]:
    """Made one at a time, because several fill most of a device's memory."""
    small = machine.shrink
    for requests, rows, context, split in (
        (16, 16, 32_768, None),
        (16, 16, 32_768, 4096),
        (1, 16, 32_768, 1024),
        (64, 16, 2048, None),
        (64, 1, 2048, None),
        (1, 2048, 2048, None),
    ):
        shape = max(1, requests // small), max(1, rows // small), max(64, context // small)
        if split is not None:
            split = max(64, split // small)
        yield _attention(machine, *shape, heads=32, kv_heads=8, dim=128, split=split)
    for fp8 in (False, True):
        wide = (max(1, 16 // small), 8, max(64, 8192 // small))
        yield _attention(machine, *wide, heads=32, kv_heads=2, dim=256, split=None, fp8=fp8)
    yield _attention(
        machine, max(1, 16 // small), 8, max(64, 8192 // small), heads=64, kv_heads=8, dim=64, split=None, window=128
    )
    for rows in (15, 60, 240):
        yield _head(machine, max(1, rows // small), width=4096 // small, vocabulary=151_936 // small)
    for requests in (1, 16, 64):
        yield from _delta(machine, max(1, requests // small), heads=max(2, 32 // small), tokens=max(2, 16 // small))
    yield from _conv(machine, requests=max(1, 64 // small), tokens=max(2, 16 // small), channels=8192 // small)
    for fp8 in (False, True):
        yield _append(machine, tokens=max(1, 1024 // small), heads=32, kv_heads=8, dim=128, fp8=fp8)
    yield _norm(machine, tokens=max(1, 1024 // small), width=4096 // small)
    for temperature in (0.0, 1.0):
        yield _sample(machine, rows=max(1, 1024 // small), vocabulary=151_936 // small, temperature=temperature)
    yield _accept(machine, requests=max(2, 64 // small), rows=16)
    yield from head_cases(machine)
    yield from drafter_cases(machine)
    yield from linear_cases(machine)
    yield from latent_cases(machine)
    yield from gate_cases(machine)
    yield from moe_cases(machine)
    yield from prefill_cases(machine)
    yield from truncation_cases(machine)


def _attention(
    machine: Machine,
    requests: int,
    rows: int,
    context: int,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    split: int | None,
    window: int | None = None,
    fp8: bool = False,
) -> Case:
    block = 16
    width = -(-context // block)
    blocks = requests * width
    batch = PagedBatch(
        machine.ints(torch.randperm(blocks).view(requests, width)),
        machine.ints([rows * request for request in range(requests + 1)]),
        machine.ints([context] * requests),
        longest_context=context,
    )
    query = machine.normal(requests * rows, heads, dim)
    keys, values = (machine.normal(blocks, block, kv_heads, dim) for _ in range(2))
    options: dict[str, Any] = {"scaling": dim**-0.5, "split_tokens": split, "sliding_window": window}
    if fp8:
        keys, values = (x.to(torch.float8_e4m3fn) for x in (keys, values))
        ones = torch.ones(keys.shape[:3], dtype=torch.bfloat16, device=machine.device)
        options |= {"key_scales": ones * 0.5, "value_scales": ones * 2}
    seen = context if window is None else min(context, window + rows)
    library = None if fp8 or window is not None else _torch_attention(query, keys, values, requests, context, dim**-0.5)
    suffix = "".join((f" window {window}" if window else "", f" split {split}" if split else "", " fp8" if fp8 else ""))
    return Case(
        f"paged_attention {requests} x {rows} rows, context {context}, heads {heads}/{kv_heads} x {dim}{suffix}",
        lambda: paged_attention.paged_attention(query, keys, values, batch, spread=True, **options),
        lambda: paged_attention_reference.paged_attention(query, keys, values, batch, **options),
        moved=2 * query.nbytes + 2 * requests * seen * kv_heads * (dim * keys.itemsize + (2 if fp8 else 0)),
        library=library,
    )


def _torch_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, requests: int, context: int, scaling: float
) -> Call:
    """torch's attention with each request's keys side by side in memory, which is more than a paged cache can give it.

    Heads that share a KV head become more rows of it where a mask is needed, so that it has a fused kernel to choose.
    """
    rows, (heads, dim), kv_heads = query.shape[0] // requests, query.shape[1:], keys.shape[2]
    dense = [x.view(requests, -1, kv_heads, dim)[:, :context].transpose(1, 2) for x in (keys, values)]
    flat = query.view(requests, rows, heads, dim).transpose(1, 2)
    if rows == context:
        return lambda: F.scaled_dot_product_attention(
            flat, dense[0], dense[1], is_causal=True, enable_gqa=True, scale=scaling
        )
    packed = flat.reshape(requests, kv_heads, heads // kv_heads * rows, dim)
    at = torch.arange(context, device=query.device)
    mask = (at <= at[context - rows :, None]).repeat(heads // kv_heads, 1)
    return lambda: F.scaled_dot_product_attention(packed, dense[0], dense[1], mask, scale=scaling)


def _head(machine: Machine, rows: int, width: int, vocabulary: int) -> Case:
    hidden, weight = machine.normal(rows, width), machine.normal(vocabulary, width) * width**-0.5

    def library() -> tuple[torch.Tensor, torch.Tensor]:
        logits = hidden @ weight.t()
        return logits.argmax(-1), logits.logsumexp(-1)

    # The best logit and the log-sum-exp: of two equally good tokens, rounding may choose either.
    return Case(
        f"draft_head {rows} rows, {width} -> {vocabulary}",
        lambda: draft_head.draft_head(hidden, weight)[1:],
        lambda: draft_head_reference.draft_head(hidden, weight)[1:],
        moved=weight.itemsize * (weight.numel() + hidden.numel()),
        library=library,
    )


def _delta(machine: Machine, requests: int, heads: int, tokens: int) -> Iterator[Case]:
    """A step of one token a request; one of blocks behind half of the blocks before; what no verify goes on from."""
    for each, standing in ((1, 0), (tokens, 0), (tokens, tokens // 2)):
        yield _delta_step(machine, requests, heads, each, standing)
    memory, kept, rows = _kept_delta(machine, requests, heads, tokens, tokens // 2)
    slots, states = machine.ints(torch.randperm(requests)), (memory, memory.clone())

    def replay(way: Any, state: torch.Tensor) -> torch.Tensor:
        way.gated_delta_replay(kept, state, slots, rows.first, rows.standing)
        return state

    # Advanced again by each run, here and below: equal numbers of runs stay comparable.
    yield Case(
        f"gated_delta_replay {requests} x {tokens // 2} tokens, {heads} heads x {memory.shape[2]}",
        lambda: replay(gated_delta, states[0]),
        lambda: replay(gated_delta_reference, states[1]),
        moved=2 * memory.nbytes + sum(part.nbytes for part in kept) // 4,
        tolerance=1e-4,
    )


def _kept_delta(
    machine: Machine, requests: int, heads: int, tokens: int, standing: int
) -> tuple[torch.Tensor, gated_delta_reference.KeptDelta, KeptRows]:
    """States, what a step has kept with room for another, and rows of which `standing` tokens stand."""
    dim, places = 128, 2 * requests * tokens
    kept = gated_delta_reference.KeptDelta(
        F.normalize(machine.normal(places, heads // 2, dim, dtype=torch.float32), dim=-1),
        -torch.rand(places, heads, device=machine.device),
        machine.normal(places, heads, dim, dtype=torch.float32),
    )
    own = [tokens * row for row in range(requests)]
    there = [requests * tokens + first for first in own]
    rows = KeptRows(machine.ints(own), machine.ints([standing] * requests), machine.ints(there))
    return machine.normal(requests, heads, dim, dim, dtype=torch.float32), kept, rows


def _delta_step(machine: Machine, requests: int, heads: int, tokens: int, standing: int) -> Case:
    """Its state is read once, and written once if anything is certain."""
    memory, kept, rows = _kept_delta(machine, requests, heads, tokens, standing)
    dim, count = memory.shape[2], requests * tokens
    query, key = F.normalize(machine.normal(2, count, heads // 2, dim).float(), dim=-1).unbind()
    value = machine.normal(count, heads, dim)
    beta, fade = torch.rand(2, count, heads, device=machine.device).unbind()
    slots, starts = machine.ints(torch.randperm(requests)), machine.ints([tokens * row for row in range(requests + 1)])
    states = [(memory, kept), (memory.clone(), gated_delta_reference.KeptDelta(*(part.clone() for part in kept)))]

    def step(way: Any, state: torch.Tensor, room: gated_delta_reference.KeptDelta) -> tuple[torch.Tensor, ...]:
        output = way.gated_delta_verify(query, key, value, -fade, beta, state, slots, starts, room, rows)
        return output, state, *room

    block = value.nbytes + 4 * (query.numel() + key.numel() + 2 * beta.numel() + value.numel())
    per_token = sum(part.nbytes for part in kept) // (2 * count)
    held = per_token * ((count if tokens > 1 else 0) + requests * standing)
    written = tokens == 1 or standing > 0
    return Case(
        f"gated_delta_verify {requests} x {tokens} tokens behind {standing}, {heads} heads x {dim}",
        lambda: step(gated_delta, *states[0]),
        lambda: step(gated_delta_reference, *states[1]),
        moved=(1 + written) * memory.nbytes + block + held,
        tolerance=1e-4,
    )


def _conv(machine: Machine, requests: int, tokens: int, channels: int) -> Iterator[Case]:
    mixed, weight = machine.normal(requests * tokens, channels), machine.normal(channels, 4)
    state, slots = machine.normal(requests, 3, channels), machine.ints(torch.randperm(requests))
    own = [tokens * row for row in range(requests + 1)]
    starts, standing = machine.ints(own), tokens // 2
    kept = machine.normal(2 * len(mixed), channels)
    into = machine.ints([len(mixed) + first for first in own[:-1]])
    rows = KeptRows(starts[:-1].clone(), machine.ints([standing] * requests), into)
    states = [(state, kept), (state.clone(), kept.clone())]

    def verify(way: Any, own: torch.Tensor, room: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return way.short_conv_verify(mixed, weight, own, slots, starts, room, rows), own, room

    before = min(standing, state.shape[1]) * requests * channels
    yield Case(
        f"short_conv_verify {requests} x {tokens} tokens behind {standing}, {channels} channels",
        lambda: verify(short_conv, *states[0]),
        lambda: verify(short_conv_reference, *states[1]),
        moved=mixed.itemsize * (3 * mixed.numel() + 2 * state.numel() + before + weight.numel()),
    )
    moving = state.clone(), state.clone()

    def advance(way: Any, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return way.short_conv_advance(mixed, weight, own, slots, starts), own

    yield Case(
        f"short_conv_advance {requests} x {tokens} tokens, {channels} channels",
        lambda: advance(short_conv, moving[0]),
        lambda: advance(short_conv_reference, moving[1]),
        moved=mixed.itemsize * (2 * mixed.numel() + 2 * state.numel() + weight.numel()),
    )

    def replay(way: Any, own: torch.Tensor) -> torch.Tensor:
        way.short_conv_replay(mixed, own, slots, rows.first, rows.standing)
        return own

    replayed = state.clone(), state.clone()
    yield Case(
        f"short_conv_replay {requests} x {standing} tokens, {channels} channels",
        lambda: replay(short_conv, replayed[0]),
        lambda: replay(short_conv_reference, replayed[1]),
        moved=2 * state.nbytes,
        tolerance=1e-12,
    )


def _append(machine: Machine, tokens: int, heads: int, kv_heads: int, dim: int, fp8: bool = False) -> Case:
    """fp8: of numbers that it holds without rounding, which Triton's interpreter gets wrong; so nothing turns."""
    query, key, value = (machine.normal(tokens, count, dim) for count in (heads, kv_heads, kv_heads))
    angles = torch.rand(tokens, dim // 2, device=machine.device).repeat(1, 2)
    stored = machine.dtype
    scales: list[list[torch.Tensor]] = [[], []]
    if fp8:
        key, value = (x.to(torch.float8_e4m3fn).to(machine.dtype) for x in (key, value))
        angles, stored = angles * 0, torch.float8_e4m3fn
        shape = (tokens + 1, 16, kv_heads)
        scales = [[torch.zeros(shape, device=machine.device).bfloat16() for _ in range(2)] for _ in range(2)]
    cos, sin = angles.cos(), angles.sin()
    caches = [torch.zeros(tokens + 1, 16, kv_heads, dim, device=machine.device).to(stored) for _ in range(4)]
    rows = machine.ints(torch.randperm(16 * tokens)[:tokens], torch.int64)

    def call(way: Any, cached: list[torch.Tensor], own: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        rotated = way.rotate_and_append(query, key, value, cos, sin, rows, *cached, *own)
        return rotated, *cached, *own

    return Case(
        f"rotate_and_append {tokens} tokens, heads {heads}/{kv_heads} x {dim}{' fp8' if fp8 else ''}",
        lambda: call(kv_append, caches[:2], scales[0]),
        lambda: call(kv_append_reference, caches[2:], scales[1]),
        moved=2 * query.nbytes + 2 * key.numel() * (key.itemsize + stored.itemsize) + 8 * cos.numel(),
    )


def _norm(machine: Machine, tokens: int, width: int) -> Case:
    x, residual, weight = machine.normal(tokens, width), machine.normal(tokens, width), machine.normal(width)
    return Case(
        f"rms_norm {tokens} x {width} with residual",
        lambda: rms_norm.rms_norm(x, weight, 1e-6, residual),
        lambda: rms_norm_reference.rms_norm(x, weight, 1e-6, residual),
        moved=x.itemsize * 4 * x.numel(),
        library=lambda: F.rms_norm(x + residual, (width,), weight, 1e-6),
    )


def _sample(machine: Machine, rows: int, vocabulary: int, temperature: float) -> Case:
    logits = machine.normal(rows, vocabulary, dtype=torch.float32) * 3
    keys = torch.randint(-(2**62), 2**62, (rows,), device=machine.device)
    temperatures = torch.full((rows,), temperature, dtype=torch.float64, device=machine.device)
    return Case(
        f"sample {rows} x {vocabulary}, temperature {temperature}",
        lambda: acceptance.sample(logits, keys, temperatures),
        lambda: acceptance_reference.sample(logits, keys, temperatures),
        moved=4 * logits.numel(),
        library=lambda: logits.argmax(-1),
        tolerance=1e-12,
    )


def _accept(machine: Machine, requests: int, rows: int) -> Case:
    """Three in four tokens are alike, so that some drafts stand and some fall."""
    samples, tokens = torch.randint(0, 4, (2, requests * rows), device=machine.device).clamp_(max=1).unbind()
    starts = machine.ints([rows * request for request in range(requests + 1)])
    return Case(
        f"accept {requests} x {rows} rows",
        lambda: acceptance.accept(samples, tokens, starts, longest=rows),
        lambda: acceptance_reference.accept(samples, tokens, starts, longest=rows),
        moved=16 * samples.numel(),
        tolerance=1e-12,
    )
