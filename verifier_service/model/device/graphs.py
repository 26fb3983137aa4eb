"""Verify steps in CUDA graphs, one for each bucket. Without a GPU the same functions run over the same buffers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch

from verifier_service.model.device.buckets import Bucket

log = logging.getLogger(__name__)

PROGRESS_S = 10.0


class StepGraphs:
    """run: computes a step of a bucket's size from static buffers into static buffers.

    A bucket whose graph could not be captured runs launch by launch from then on, which is logged once and counted in
    `failures`. Graphs share their memory: one runs after the other, and what a step leaves behind lies outside of it.
    """

    def __init__(self, run: Callable[[Bucket], None], device: torch.device):
        self._run, self._captures = run, device.type == "cuda"
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph | None] = {}
        self._memory = torch.cuda.graph_pool_handle() if self._captures else None
        self._stream = torch.cuda.Stream(device) if self._captures else None
        self.failures = 0

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, bucket: Bucket) -> None:
        """A bucket that has no graph yet is run launch by launch, and captured for the next time."""
        if not self._captures:
            self._run(bucket)
        elif bucket not in self._graphs:
            self._run(bucket)
            self._capture(bucket)
        elif (graph := self._graphs[bucket]) is None:
            self._run(bucket)
        else:
            graph.replay()

    def capture_all(self, buckets: Iterable[Bucket]) -> None:
        """Largest first, so that the memory of the others is found inside of its. Collective, like a step.

        The static buffers have to describe a step without rows.
        """
        if not self._captures:
            return
        wanted = sorted(buckets, reverse=True)
        told = began = time.monotonic()
        free = _free_memory()
        for done, bucket in enumerate(wanted, 1):
            self._run(bucket)  # what is compiled or allocated at its first use must not be during capture
            self._capture(bucket)
            if time.monotonic() - told > PROGRESS_S or done == len(wanted):
                told = time.monotonic()
                took = (free - _free_memory()) / 1e9
                log.info("captured %d of %d CUDA graphs, %.2f GB, after %.0f s", done, len(wanted), took, told - began)

    def forget(self) -> None:
        """What `run` computes has changed."""
        self._graphs.clear()

    def _capture(self, bucket: Bucket) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, self._memory, self._stream, capture_error_mode="thread_local"):
                self._run(bucket)
        except RuntimeError as error:
            if not self.failures:
                log.warning("steps of %s run launch by launch, which costs time: no CUDA graph (%s)", bucket, error)
            self.failures += 1
            self._graphs[bucket] = None
        else:
            self._graphs[bucket] = graph


def _free_memory() -> int:
    """Bytes of the device that nobody holds, once the allocator has given back what it does not need."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
