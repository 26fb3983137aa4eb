"""Draft tokens from blocks on the Triton kernels, in CUDA graphs where there is a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from drafter_service.attention import Block
from drafter_service.blocks import BlockDrafting, Drafts, by_block
from drafter_service.buckets import Bucket, Buckets
from drafter_service.kernel_model import InjectedPool, KernelDFlash
from drafter_service.loading import LoadedDrafter
from drafter_service.step_buffers import StepBuffers
from drafter_service.step_graphs import captured

GRAPH_BLOCKS = 64  # a batch of more blocks is bound by its arithmetic, not by its launches


class KernelDrafter(BlockDrafting):
    """As `BlockDrafter`. On a GPU every bucket of batch sizes is captured once, when it is made.

    A batch that no graph holds, and every batch where capturing failed, runs launch by launch through the same buffers.
    blocks: of one batch at most, None = as many as slots. graphs: capture CUDA graphs.
    """

    def __init__(self, loaded: LoadedDrafter, slots: int, blocks: int | None = None, graphs: bool = True):
        self.counters = Counter()
        self.pool = pool = InjectedPool(loaded, slots)
        config, device = loaded.config, loaded.model.device
        self._model = KernelDFlash(loaded, pool, pool.rotation)
        most = slots if blocks is None else blocks
        self._buckets = Buckets(min(most, GRAPH_BLOCKS), config.block_size)
        self._buffers = StepBuffers(most, config.block_size, config.mask_token_id, device)
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._warm_up(loaded)
        self.graphs = len(list(self._buckets)) if device.type == "cuda" else 0
        if self.graphs and graphs:
            self._graphs = captured(self._forward, self._buckets, self._describe_nothing)
        captured_graphs = len(self._graphs)
        self.counters = Counter(rows=0, padding_rows=0, eager_steps=0, graphs=captured_graphs)
        self.counters["graph_failures"] = self.graphs - captured_graphs if graphs else 0

    def draft(self, blocks: Sequence[Block], bonus_tokens: Sequence[int]) -> list[Drafts]:
        """As `BlockDrafter.draft`. The host waits once, for the answers."""
        total = sum(block.rows for block in blocks)
        asked = total - len(blocks)
        bucket = self._buckets.choose(len(blocks), total)
        self._buffers.send(bucket, blocks, bonus_tokens)
        graph = self._graphs.get(bucket)
        if graph is None:
            self._forward(bucket)
            self.counters["eager_steps"] += 1
        else:
            graph.replay()
        self.counters["rows"] += total
        self.counters["padding_rows"] += bucket.rows - total
        return by_block(blocks, *self._buffers.receive(bucket, asked))

    def _forward(self, bucket: Bucket) -> None:
        self._model.forward(self._buffers.inputs(bucket), self._buffers.answers(bucket))

    def _describe_nothing(self, bucket: Bucket) -> None:
        self._buffers.send(bucket, [], [])
