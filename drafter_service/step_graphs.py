"""CUDA graphs of a step, one for each bucket of sizes, captured once and replayed for every batch of that size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from drafter_service.buckets import Bucket

log = logging.getLogger(__name__)


@torch.inference_mode()
def captured(
    step: Callable[[Bucket], None], buckets: Iterable[Bucket], describe: Callable[[Bucket], None]
) -> dict[Bucket, torch.cuda.CUDAGraph]:
    """A graph of step(bucket) for each bucket, or none at all where capturing fails, which is logged.

    The graphs share their memory, since one runs after the other; give the largest bucket first. describe(bucket) fills
    the buffers that the step reads with something it can run on; its copies are done when the next one is called, as
    beginning a capture waits for the device.
    """
    graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
    try:
        memory, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for bucket in buckets:
            describe(bucket)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(bucket)  # what is loaded or compiled at its first use must not be so during capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                step(bucket)
            graphs[bucket] = graph
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        log.warning("steps run launch by launch, which costs time: no CUDA graph could be captured (%s)", error)
        return {}
    log.info("%d CUDA graphs, for up to %d blocks", len(graphs), max((each.blocks for each in graphs), default=0))
    return graphs
