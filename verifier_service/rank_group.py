"""The ranks of one target as a process group, from the first that waits for the others to the end of their lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from verifier_service.joint_start import JointStart

MEET_S = 300.0  # for all ranks' processes to be there
STEP_S = 120.0  # longest silence between ranks; idle ones hear from each other every second


@dataclass(frozen=True)
class Ranks:
    """group: None for a single rank. meet(): returns when every rank has called it."""

    group: Any
    meet: Callable[[], None]


@contextmanager
def joined_ranks(size: int, device: str, rank: int, rendezvous: str) -> Iterator[Ranks]:
    """The process group of all ranks: gloo on CPU; on CUDA NCCL, with gloo beside it for plans.

    rendezvous: "host:port" on rank 0's machine, free; unused for a single rank. What is raised before all have met is
    raised on all ranks: see JointStart.
    """
    if size == 1:
        yield Ranks(None, lambda: None)
        return
    host, _, port = rendezvous.rpartition(":")
    store = dist.TCPStore(host, int(port), size, is_master=rank == 0, timeout=timedelta(seconds=MEET_S))
    start = JointStart(lambda: dist.TCPStore(host, int(port), wait_for_workers=False), rank, size)
    met = False

    def meet() -> None:
        nonlocal met
        start.meet()
        met = True

    try:
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=STEP_S))
        yield Ranks(dist.group.WORLD, meet)
    except Exception as error:
        if met:
            raise
        raise start.failed(error) from error  # with the group as it is: leaving it may wait for the others
    finally:
        if met:
            dist.destroy_process_group()
