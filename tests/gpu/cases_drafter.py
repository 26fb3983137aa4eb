"""The drafter's kernels in the shape of Qwen3-8B's drafter: five layers, 32/8 heads of 128, hidden 4096, block 16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from kernels.block_attention import kernel as block_attention
from kernels.block_attention import reference as block_attention_reference
from kernels.block_attention.batch import BlockBatch
from kernels.block_conv import kernel as block_conv
from kernels.block_conv import reference as block_conv_reference
from kernels.candidate_selector import kernel as candidate_selector
from kernels.candidate_selector import reference as candidate_selector_reference
from kernels.context_inject import kernel as context_inject
from kernels.context_inject import reference as context_inject_reference
from kernels.context_inject.reference import Rotation
from kernels.draft_head import kernel as draft_head
from kernels.draft_head import reference as draft_head_reference
from tests.gpu.case import Call, Case, Machine

BLOCK = 16
EPS = 1e-6


def drafter_cases(machine: Machine) -> Iterator[Case]:
    small = machine.shrink
    heads, kv_heads = (32, 8) if small == 1 else (4, 1)
    for tokens in (16, 1024):
        yield _inject_context(
            machine, max(2, tokens // small), layers=5 if small == 1 else 2, kv_heads=kv_heads, dim=128
        )
    yield _inject_block(machine, tokens=max(2, 256 // small), heads=heads, kv_heads=kv_heads, dim=128)
    for blocks, context, options in (
        (1, 4096, {}),
        (16, 4096, {}),
        (64, 2048, {}),
        (64, 4096, {"sliding_window": 2048, "causal": True}),
    ):
        held = max(96, context // small)
        yield _attention(
            machine, max(2, blocks // small), held, heads=heads, kv_heads=kv_heads, dim=128, options=options
        )
    vocabulary = 248_320 if small == 1 else 140
    yield _candidates(machine, rows=max(1, 60 // small), width=4096 // small, vocabulary=vocabulary)
    yield _selector(machine, blocks=max(1, 16 // small), vocabulary=vocabulary)
    for blocks in (1, 64):
        yield _convolution(machine, blocks=max(1, blocks // small), channels=4096 // small)


def _inject_context(machine: Machine, tokens: int, layers: int, kv_heads: int, dim: int) -> Case:
    width = layers * 2 * kv_heads * dim
    projected = machine.normal(tokens, width)
    norms, rotation = machine.normal(layers, dim), _rotation(machine, dim)
    positions = machine.ints(torch.arange(tokens) + 30_000, torch.int64)
    rows = machine.ints(torch.randperm(2 * tokens)[:tokens], torch.int64)
    pools = [
        torch.zeros(layers, 2 * tokens, 2, kv_heads, dim, dtype=machine.dtype, device=machine.device) for _ in "ab"
    ]
    places = [torch.zeros(2 * tokens, dtype=torch.int64, device=machine.device) for _ in "ab"]

    def call(way: Any, which: int) -> tuple[torch.Tensor, ...]:
        target = pools[which], places[which]
        way.inject_context(projected, norms, positions, rows, rotation, EPS, *target)
        return target

    return Case(
        f"inject_context {tokens} tokens, {layers} layers, heads {kv_heads} x {dim}",
        lambda: call(context_inject, 0),
        lambda: call(context_inject_reference, 1),
        moved=2 * projected.nbytes + 16 * tokens,
        tolerance=3e-2,
    )


def _inject_block(machine: Machine, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    qkv, rotation = machine.normal(tokens, heads + 2 * kv_heads, dim), _rotation(machine, dim)
    norms = machine.normal(2, dim)
    positions = machine.ints(torch.arange(tokens) + 30_000, torch.int64)
    rows = machine.ints(torch.randperm(2 * tokens)[:tokens], torch.int64)
    pools = [torch.zeros(2 * tokens, 2, kv_heads, dim, dtype=machine.dtype, device=machine.device) for _ in "ab"]

    def call(way: Any, pool: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return way.inject_block(qkv, norms[0], norms[1], positions, rows, rotation, EPS, pool), pool

    return Case(
        f"inject_block {tokens} tokens, heads {heads}/{kv_heads} x {dim}",
        lambda: call(context_inject, pools[0]),
        lambda: call(context_inject_reference, pools[1]),
        moved=2 * qkv.nbytes,
        tolerance=3e-2,
    )


def _attention(
    machine: Machine, blocks: int, held: int, heads: int, kv_heads: int, dim: int, options: dict[str, Any]
) -> Case:
    """Contexts in random order, each in a slot of its own."""
    stride, tokens = held + BLOCK, blocks * BLOCK
    positions = torch.stack([torch.randperm(stride) for _ in range(blocks)]).flatten()
    batch = BlockBatch(
        machine.ints(torch.arange(blocks + 1) * BLOCK, torch.int64),
        machine.ints(torch.arange(blocks) * stride, torch.int64),
        machine.ints([held] * blocks, torch.int64),
        machine.ints([stride] * blocks, torch.int64),
        longest_block=BLOCK,
        longest_context=held,
    )
    places = machine.ints(positions, torch.int64)
    query, pool = machine.normal(tokens, heads, dim), machine.normal(blocks * stride, 2, kv_heads, dim)
    seen = min(held, options.get("sliding_window", held)) + BLOCK
    call: dict[str, Any] = {"scaling": dim**-0.5, "section_rows": max(64, 512 // machine.shrink), **options}
    spread = blocks * kv_heads < 128
    return Case(
        f"block_attention {blocks} x {BLOCK} rows, context {held}, heads {heads}/{kv_heads} x {dim}"
        + "".join(f" {name} {value}" for name, value in options.items()),
        lambda: block_attention.block_attention(query, pool, places, batch, spread=spread, **call),
        lambda: block_attention_reference.block_attention(query, pool, places, batch, **call),
        moved=2 * query.nbytes + blocks * (2 * seen * kv_heads * dim * pool.itemsize + 8 * held * kv_heads),
        library=None if options else _torch_attention(query, pool, blocks, dim**-0.5),
    )


def _candidates(machine: Machine, rows: int, width: int, vocabulary: int) -> Case:
    hidden, weight = machine.normal(rows, width), machine.normal(vocabulary, width) * width**-0.5

    def library() -> tuple[Any, torch.Tensor]:
        logits = hidden @ weight.t()
        return logits.topk(16), logits.logsumexp(-1)

    # Logits and the log-sum-exp: of two equally good tokens, rounding may choose either.
    return Case(
        f"draft_candidates {rows} rows, {width} -> {vocabulary}, 16 of them",
        lambda: draft_head.draft_candidates(hidden, weight, 16)[1:],
        lambda: draft_head_reference.draft_candidates(hidden, weight, 16)[1:],
        moved=weight.itemsize * (weight.numel() + hidden.numel()),
        library=library,
    )


def _selector(machine: Machine, blocks: int, vocabulary: int) -> Case:
    """Candidates far apart, so that rounding changes no choice."""
    k, rank, rows = 16, 256, blocks * (BLOCK - 1)
    candidates = machine.ints(torch.randint(0, vocabulary, (rows, k)), torch.int64)
    logits = machine.ints(torch.stack([torch.randperm(k) for _ in range(rows)]), torch.float32)
    codebooks = [machine.normal(vocabulary, rank) * rank**-0.5 for _ in "ps"]
    hidden = machine.normal(rows, rank)
    anchors = machine.ints(torch.arange(blocks) % vocabulary, torch.int64)
    starts = machine.ints(torch.arange(blocks + 1) * (BLOCK - 1), torch.int64)
    given = candidates, logits, hidden, anchors, starts, *codebooks
    return Case(
        f"select_path {blocks} x {BLOCK - 1} rows, {k} candidates of {vocabulary}, rank {rank}",
        lambda: tuple(candidate_selector.select_path(*given)),
        lambda: tuple(candidate_selector_reference.select_path(*given)),
        moved=rows * (k + 2) * rank * hidden.itemsize + rows * k * 12,
    )


def _convolution(machine: Machine, blocks: int, channels: int) -> Case:
    taps, group, rows = 2, 16, blocks * BLOCK
    x, base = machine.normal(rows, channels), machine.normal(taps, channels)
    dynamic = machine.normal(rows, 2, taps, channels // group)[:, 0]
    places = machine.ints(torch.arange(BLOCK).repeat(blocks), torch.int64)
    return Case(
        f"convolve_block {blocks} x {BLOCK} rows, {channels} channels in groups of {group}",
        lambda: block_conv.convolve_block(x, dynamic, base, places),
        lambda: block_conv_reference.convolve_block(x, dynamic, base, places),
        moved=2 * x.nbytes + base.nbytes + rows * taps * channels // group * x.itemsize,
    )


def _torch_attention(query: torch.Tensor, pool: torch.Tensor, blocks: int, scaling: float) -> Call:
    """torch's attention without a mask, keys of each head side by side, heads of a group as more rows."""
    heads, dim = query.shape[1:]
    keys, values = pool.view(blocks, -1, 2, pool.shape[2], dim).permute(2, 0, 3, 1, 4).contiguous().unbind()
    rows = query.view(blocks, -1, pool.shape[2], heads // pool.shape[2], dim).permute(0, 2, 1, 3, 4).flatten(2, 3)
    return lambda: F.scaled_dot_product_attention(rows, keys, values, scale=scaling)


def _rotation(machine: Machine, dim: int) -> Rotation:
    frequencies = 1e6 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return Rotation(frequencies.to(machine.device))
