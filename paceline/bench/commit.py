"""Gated DeltaNet: committing a verified block by replay, against keeping the state after every position.

Both verify the same random block and commit the same prefixes; their states must agree. What is counted is what a
verify has to keep until its outcome is known, how many bytes of states a verify and its commit read and write, and the
time of both in the recurrence itself: projections, convolution and output, which both need alike, are left out.
Replaying within the next verify, as the kernels do, is the same arithmetic and is counted only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table

from paceline.bench.errors import BenchError
from verifier_service.model.delta_rule import one_block, one_token, unit
from verifier_service.model.recurrent_state import RecurrentStates, Verified

CONV_WINDOW = 3
TOLERANCE = 1e-3  # of a state's largest value


@dataclass(frozen=True)
class Shape:
    """Of a target's recurrent layers on one rank. heads: of values; channels: of the convolution."""

    name: str
    layers: int
    heads: int
    key_dim: int
    value_dim: int
    channels: int


TINY = Shape("tiny pair, 3 layers", 3, 8, 32, 32, 512)
LARGE = Shape("Qwen3.5-397B, 1 of 45 layers", 1, 64, 128, 128, 12288)


@dataclass(frozen=True)
class CommitRow:
    """Milliseconds are medians, None if not timed. kept_bytes: between verify and commit, beside the states themselves;
    moved_bytes: of states, read and written by a verify and its commit.
    """

    shape: str
    method: str
    rows: int
    block: int
    verify_ms: float | None
    commit_ms: float | None
    kept_bytes: int
    moved_bytes: int


@dataclass(frozen=True)
class _Block:
    """A block of every layer: query, key [rows, heads, Q, key_dim], value, log_decay, beta, and conv inputs."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    log_decay: torch.Tensor
    beta: torch.Tensor
    mixed: torch.Tensor


@torch.inference_mode()
def measure(shape: Shape, rows: int, block: int, repeats: int) -> tuple[CommitRow, CommitRow, CommitRow]:
    """Replay, snapshots (on one thread of the CPU) and replay in the next verify. Raises BenchError if their committed
    states differ.
    """
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    blocks = [_random(shape, rows, block, generator) for _ in range(shape.layers)]
    start = torch.randn(shape.layers, rows, shape.heads, shape.key_dim, shape.value_dim, generator=generator)
    kept = [1 + (7 * row) % block for row in range(rows)]
    timed: dict[str, list[tuple[float, float]]] = {"replay": [], "snapshots": []}
    states: dict[str, torch.Tensor] = {}
    sizes: dict[str, int] = {}
    for _ in range(repeats):
        for method, run in (("replay", _replay), ("snapshots", _snapshots)):
            verify, commit = run(shape, blocks, start.clone(), kept)
            began = time.perf_counter()
            sizes[method] = verify()
            verified = time.perf_counter()
            states[method] = commit()
            timed[method].append((verified - began, time.perf_counter() - verified))
    difference = (states["replay"] - states["snapshots"]).abs().max() / states["snapshots"].abs().max()
    if not difference < TOLERANCE:
        raise BenchError(
            f"{shape.name}: replay and snapshots commit states that differ by {difference:.1e} of their size"
        )

    def row(method: str, passes: int) -> CommitRow:
        verify_ms, commit_ms = (1000 * statistics.median(seconds) for seconds in zip(*timed[method]))
        return CommitRow(shape.name, method, rows, block, verify_ms, commit_ms, sizes[method], passes * start.nbytes)

    return (
        row("replay", 3),  # read by both, written by the commit
        row("snapshots", 3 + block),  # all that are written, and what stands from there to its place
        CommitRow(shape.name, "replay in next verify", rows, block, None, None, sizes["replay"], 2 * start.nbytes),
    )


def table(rows: list[CommitRow]) -> Table:
    made = Table(title="Gated DeltaNet: verify and commit of a block", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "method", "rows x block", "verify ms", "commit ms", "kept MB", "states moved MB"):
        made.add_column(heading, justify="right" if heading.endswith(("ms", "MB", "block")) else "left")
    for row in rows:
        times = ("-" if ms is None else f"{ms:.2f}" for ms in (row.verify_ms, row.commit_ms))
        sizes = (f"{size / 1e6:.2f}" for size in (row.kept_bytes, row.moved_bytes))
        made.add_row(row.shape, row.method, f"{row.rows} x {row.block}", *times, *sizes)
    return made


Run = tuple[Callable[[], int], Callable[[], torch.Tensor]]  # verify -> bytes kept; commit -> memory [layers, rows, ...]


def _replay(shape: Shape, blocks: list[_Block], start: torch.Tensor, kept: list[int]) -> Run:
    slots = range(len(kept))
    states = RecurrentStates(
        shape.layers,
        len(kept),
        window=CONV_WINDOW,
        channels=shape.channels,
        heads=shape.heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        dtype=torch.float32,
        device="cpu",
    )
    states.memory.copy_(start)

    def verify() -> int:
        states.begin_verify(slots)
        size = 0
        for layer, b in enumerate(blocks):
            _, decay, corrected = one_block(b.query, b.key, b.value, b.log_decay, b.beta, states.memory[layer])
            states.keep(layer, Verified(b.mixed, b.key, decay, corrected))
            size += b.mixed.nbytes + b.key.nbytes + decay.nbytes + corrected.nbytes
        return size

    def commit() -> torch.Tensor:
        states.commit(dict(zip(slots, kept)))
        return states.memory

    return verify, commit


def _snapshots(shape: Shape, blocks: list[_Block], memory: torch.Tensor, kept: list[int]) -> Run:
    rows, count = len(kept), blocks[0].key.shape[2]
    taken = torch.empty(count, *memory.shape)  # [Q, layers, rows, heads, key_dim, value_dim]

    def verify() -> int:
        for layer, b in enumerate(blocks):
            state = memory[layer].reshape(-1, shape.key_dim, shape.value_dim)
            for at in range(count):
                query, key, value = (x[:, :, at].flatten(0, 1) for x in (b.query, b.key, b.value))
                log_decay, beta = b.log_decay[:, :, at].flatten(), b.beta[:, :, at].flatten()
                _, state = one_token(query, key, value, log_decay, beta, state)
                taken[at, layer] = state.view(rows, shape.heads, shape.key_dim, shape.value_dim)
        return taken.nbytes + sum(b.mixed.nbytes for b in blocks)

    def commit() -> torch.Tensor:
        for row, tokens in enumerate(kept):
            memory[:, row] = taken[tokens - 1, :, row]
        return memory

    return verify, commit


def _random(shape: Shape, rows: int, block: int, generator: torch.Generator) -> _Block:
    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(rows, *sizes, generator=generator)

    return _Block(
        query=unit(normal(shape.heads, block, shape.key_dim)) * shape.key_dim**-0.5,
        key=unit(normal(shape.heads, block, shape.key_dim)),
        value=normal(shape.heads, block, shape.value_dim),
        log_decay=-normal(shape.heads, block).abs() * 0.1,
        beta=torch.sigmoid(normal(shape.heads, block)),
        mixed=normal(CONV_WINDOW + block, shape.channels),
    )
