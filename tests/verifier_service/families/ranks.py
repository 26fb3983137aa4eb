"""Runs a row's schedule on one rank, and many of them on one group of processes: starting those is what costs."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.contracts import EngineInfo
from tests.verifier_service.families.schedule import (
    BLOCK_TOKENS,
    SLOTS,
    Adversary,
    Client,
    Row,
    Texts,
    Watched,
)
from verifier_service.engine import Engine, follow
from verifier_service.model.runner import TargetRunner
from verifier_service.packing import PlanChannel
from verifier_service.scheduler import SchedulerLimits

PROCESSES = 4  # one group of four ranks, and two of two
PATIENCE_S = 120.0
CHECKPOINT_BYTES = 100_000  # a few states of a prefix


@dataclass(frozen=True)
class Job:
    """A schedule over one target on `size` ranks. sockets: the ranks talk as those on two hosts do.

    deterministic: as TargetRunner takes it. ahead: steps are launched before the one before is read, in stretches
    without drafts.
    """

    row: str
    directory: Path
    text_seed: int
    texts: Texts
    seed: int
    size: int
    sockets: bool = False
    deterministic: bool = False
    ahead: bool = False

    @property
    def name(self) -> str:
        mode = ", deterministic" if self.deterministic else ""
        return f"{self.row}, {self.size} ranks, texts {self.text_seed}, schedule {self.seed}{mode}"


@dataclass(frozen=True)
class Outcome:
    """What the schedule gave, on rank 0; on the others only bytes and whether they kept silent.

    outputs, finishes: by request. rows: by request and index of the token. weight_bytes, kv_bytes_per_token: of this
    rank. spoke: has had logits or taps.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    spoke: bool
    outputs: dict[str, list[int]]
    finishes: dict[str, str]
    rows: dict[tuple[str, int], Row]
    counters: dict[str, float]
    seconds: float


def run(job: Job, rank: int = 0, group: dist.ProcessGroup | None = None) -> Outcome:
    """Every rank of the group calls it with the same job."""
    limits = _limits(job.seed)
    exchange = mock.patch("modeling.ranks.open_host_exchange", return_value=None)
    if job.sockets:
        exchange.start()
    runner = TargetRunner(
        job.directory,
        rank=rank,
        size=job.size,
        group=group,
        num_blocks=limits.blocks,
        block_tokens=BLOCK_TOKENS,
        num_slots=SLOTS,
        dtype=torch.float32,
        device="cpu",
        max_context=128,
        checkpoint_bytes=CHECKPOINT_BYTES,
        deterministic=job.deterministic,
    )
    if job.sockets:
        exchange.stop()
    watched, channel = Watched(runner), PlanChannel(group)
    client = Client(job.texts, job.seed)
    counters: dict[str, float] = {}
    began = time.monotonic()
    if rank == 0:
        shape = runner.shape
        info = EngineInfo("engine", "fingerprint", shape.max_context, shape.vocabulary, SLOTS, 8)
        adversary = Adversary(client, watched, job.seed, rests=job.ahead)
        engine = Engine(watched, limits, info, proposer=adversary, channel=channel, runs_ahead=job.ahead)
        client.begin(engine)
        engine.start()
        finished = client.done.wait(PATIENCE_S)
        engine.stop()
        assert finished, f"{job.name}: {client.finishes} is all that finished within {PATIENCE_S:.0f} s"
        failed = [finish for finish in client.finishes.values() if finish.startswith("error")]
        assert not failed, f"{job.name}: {failed}"
        counters = {**engine.status().counters, "steps": float(engine.status().step)}
    else:
        follow(watched, channel)
    return Outcome(
        weight_bytes=runner.weight_bytes,
        kv_bytes_per_token=runner.shape.kv_bytes_per_token,
        spoke=watched.spoke,
        outputs=client.outputs,
        finishes=client.finishes,
        rows=client.rows,
        counters=counters,
        seconds=time.monotonic() - began,
    )


def start(jobs: Sequence[Job], directory: Path) -> Any:
    """Start the processes for all jobs of more than one rank; outcomes are files in `directory` once they joined.

    The two pairs share the jobs of two ranks; the four ranks then take those of four together.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # the libraries are imported once
    args = (tuple(jobs), f"file://{directory}/rendezvous", directory)
    return mp.start_processes(_process, args=args, nprocs=PROCESSES, join=False, start_method="forkserver")


def join(processes: Any, timeout_s: float) -> None:
    """Wait for the processes to end. Raises what one of them raised, or TimeoutError."""
    deadline = time.monotonic() + timeout_s
    try:
        while not processes.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the ranks have not ended within {timeout_s:.0f} s")
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()


def outcomes(job: Job, directory: Path) -> list[Outcome]:
    """Of each rank, after the processes have joined."""
    return [torch.load(_file(directory, job, rank), weights_only=False) for rank in range(job.size)]


def _process(index: int, jobs: tuple[Job, ...], rendezvous: str, directory: Path) -> None:
    torch.set_num_threads(1)
    deadline = timedelta(seconds=PATIENCE_S + 60 * len(jobs))  # one pair may have less to do than the other
    dist.init_process_group("gloo", init_method=rendezvous, rank=index, world_size=PROCESSES, timeout=deadline)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, PROCESSES, 2)]
    pair, rank = divmod(index, 2)
    for job in [job for job in jobs if job.size == 2][pair::2]:
        torch.save(run(job, rank, pairs[pair]), _file(directory, job, rank))
    for job in jobs:
        if job.size == PROCESSES:
            torch.save(run(job, index, dist.group.WORLD), _file(directory, job, index))
    dist.destroy_process_group()


def _file(directory: Path, job: Job, rank: int) -> Path:
    return directory / f"{job.name}-rank{rank}.pt"


def _limits(seed: int) -> SchedulerLimits:
    """A step holds less than a prompt, so that prefill comes in chunks; blocks hold about two requests."""
    return SchedulerLimits(
        slots=SLOTS,
        blocks=(18, 22, 30)[seed % 3],
        block_tokens=BLOCK_TOKENS,
        step_tokens=(12, 20, 33)[seed // 3 % 3],
        max_waiting=20,
    )
