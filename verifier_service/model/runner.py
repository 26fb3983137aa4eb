"""One rank's target: executes step plans over paged KV and recurrent states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from modeling.deterministic import DeterministicOperations
from modeling.families import family_of, shard_map
from modeling.kernel_choice import wants_triton
from modeling.kv_dtype import KvDtype
from modeling.memory_meter import CudaMeter
from modeling.operations import TorchOperations
from modeling.ranks import join_ranks
from modeling.reader import CheckpointReader
from modeling.target_config import read_target_config
from modeling.weights import LoadProgress, RankWeights
from verifier_service.model import touchpoints
from verifier_service.model.device.buckets import SECTIONED_ROWS
from verifier_service.model.executor import Executor
from verifier_service.model.face import ForwardOutput, ModelShape
from verifier_service.model.forms import DETERMINISTIC, FAST
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.kv_storage import KvStorage
from verifier_service.model.largest_steps import LargestSteps
from verifier_service.model.loading import load_rank
from verifier_service.model.memory_room import MemoryLimits, kv_blocks
from verifier_service.model.taken import TakenTokens
from verifier_service.model.torch_executor import TorchExecutor
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

log = logging.getLogger(__name__)


class TargetRunner:
    """Implements face.Runner. Every rank of the group is given the same plans in the same order.

    num_blocks x block_tokens: KV capacity in tokens; num_blocks None: what room there is within `memory`, over kernels
    on CUDA; the log then has a table of it. kv_dtype: of the KV cache, "auto" = dtype. num_slots: running requests.
    max_context: None = the checkpoint's own limit. checkpoint_bytes: for checkpoints of recurrent state. deterministic:
    results depend neither on the batch nor on `size`, to the bit (on CPU, or over kernels). taps: see set_taps.
    progress: told of every tensor while weights load.
    Raises CheckpointError (a ValueError) for a checkpoint that cannot be served on `size` ranks.
    """

    def __init__(
        self,
        target_dir: str | Path,
        *,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        num_blocks: int | None,
        block_tokens: int,
        num_slots: int,
        dtype: torch.dtype,
        device: str,
        kv_dtype: KvDtype = "auto",
        max_context: int | None = None,
        checkpoint_bytes: int = 0,
        deterministic: bool = False,
        taps: Sequence[int] = (),
        progress: Callable[[LoadProgress], None] | None = None,
        kernel_path: KernelPath = KernelPath(),
        memory: MemoryLimits = MemoryLimits(),
    ):
        over_kernels = wants_triton(kernel_path.kernels, device)
        config = read_target_config(target_dir)
        family = family_of(config)
        shards = shard_map(config, size)
        self._ranks = join_ranks(rank, size, group, device)
        with CheckpointReader(target_dir) as reader, torch.inference_mode():
            weights = RankWeights(
                reader, config, shards, rank=rank, size=size, dtype=dtype, device=device, progress=progress
            )
            forms = DETERMINISTIC if deterministic else FAST
            empty = touchpoints.empty_model(config, dtype, forms.attention)
            load = partial(load_rank, empty, weights, family, self._ranks, forms=forms)
            if over_kernels:
                from modeling.kernel_operations import (  # these import triton
                    DeterministicTritonOperations,
                    TritonOperations,
                )
                from verifier_service.model.device import forms as kernel_forms
                from verifier_service.model.device.executor import KernelExecutor
                from verifier_service.model.device.loading import kernel_layer, kernel_norm

                mixing = kernel_forms.DETERMINISTIC if deterministic else kernel_forms.FAST
                self._model = load(
                    DeterministicTritonOperations(dtype, size, device=device) if deterministic else TritonOperations(),
                    make_layer=partial(kernel_layer, forms=mixing),
                    make_norm=kernel_norm,
                )
                make: Callable[..., Executor] = partial(KernelExecutor, path=kernel_path, forms=mixing)
            else:
                self._model = load(DeterministicOperations(dtype, size) if deterministic else TorchOperations())
                make = partial(TorchExecutor, replay=forms.replay)
        self.weight_bytes = weights.bytes
        limit = min(config.max_context, max_context or config.max_context)
        make = partial(
            make,
            first=rank == 0,
            vocabulary=config.vocabulary,
            num_slots=num_slots,
            max_context=limit,
            checkpoint_bytes=checkpoint_bytes,
        )

        def over(blocks: int, **options: Any) -> Any:
            tables = BlockTables(num_slots, -(-limit // block_tokens), block_tokens, blocks)
            return make(self._model, tables, KvStorage(blocks, block_tokens, kv_dtype, dtype, device), **options)

        with torch.inference_mode():
            if num_blocks is None:
                from verifier_service.model.device.profile import measured_memory

                rows = kernel_path.rows(num_slots)
                found, block_bytes = measured_memory(
                    partial(over, path=replace(kernel_path, graphs=False)),
                    CudaMeter(),
                    LargestSteps(num_slots, rows, memory.step_tokens, block_tokens, limit, SECTIONED_ROWS),
                    memory,
                    weight_bytes=weights.bytes,
                    checkpoint_bytes=checkpoint_bytes,
                    taps=kernel_path.taps,
                )
                own = torch.tensor([kv_blocks(found, block_bytes)], device=device)
                num_blocks = min(int(blocks) for blocks in self._ranks.gather(own))
                cache = f"KV cache of {num_blocks * block_tokens} tokens"
                log.info("memory of rank %d\n%s", rank, found.table(cache, num_blocks * block_bytes))
            self._executor: Executor = over(num_blocks)
        checkpoints = self._executor.checkpoints
        self._committed = [0] * num_slots  # tokens in each slot's recurrent state
        self._saved = [0] * (checkpoints or 0)  # tokens in each checkpoint
        self.shape = ModelShape(
            vocabulary=config.vocabulary,
            hidden=config.hidden,
            max_context=limit,
            kv_bytes_per_token=self._executor.cache_bytes // (num_blocks * block_tokens),
            checkpoints=checkpoints,
            blocks=num_blocks,
            device=device,
            draws=over_kernels,
        )
        self._taken = TakenTokens(self._ranks, device)
        self._taps: tuple[int, ...] = ()
        self.set_taps(taps)

    def set_taps(self, layer_ids: Sequence[int]) -> None:
        """0-based layer outputs to return as taps; empty = none. Raises ValueError for a layer that does not exist."""
        layers = len(self._model.layers)
        wrong = [layer for layer in layer_ids if not 0 <= layer < layers]
        if wrong:
            raise ValueError(f"tap layers {wrong} do not exist: the target has layers 0..{layers - 1}")
        self._taps = tuple(layer_ids)

    def counters(self) -> dict[str, float]:
        """As face.Runner has it."""
        return {**self._executor.counters}

    def feed(self, tokens: torch.Tensor) -> None:
        """As face.Runner has it."""
        self._taken.put(tokens)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> ForwardOutput:
        """Execute a plan, commit of `decided` included. Collective; does not wait for a GPU.

        Raises RuntimeError for a plan that contradicts the slots' state (a bug of the planner).
        """
        self._account(plan)
        output = self._executor.execute(plan, self._taps, self._taken.everywhere() if plan.ahead else None)
        if output.tokens is not None and not plan.late:
            self._taken.put_everywhere(output.tokens.clamp(min=0))
        elif self._ranks.rank > 0:
            self._taken.expect(plan)
        return output

    def _account(self, plan: StepPlan) -> None:
        for slot, kept, checkpoint in plan.saved:
            self._saved[checkpoint] = self._committed[slot] + kept
        for slot, kept in plan.decided:
            self._committed[slot] += kept
        for slot in plan.released:
            self._committed[slot] = 0
        for slot, checkpoint in plan.restored:
            self._committed[slot] = self._saved[checkpoint]
        self._follow(plan)

    def _follow(self, plan: StepPlan) -> None:
        """A recurrent state knows one position only: going on from another would be silently wrong."""
        work: list[VerifyRow | PrefillChunk] = [*plan.verify, *plan.prefill]
        for item in work:
            if item.start and item.start != self._committed[item.slot] and self.shape.checkpoints is not None:
                raise RuntimeError(
                    f"slot {item.slot} holds the state of {self._committed[item.slot]} tokens, but the plan of step "
                    f"{plan.step} goes on at {item.start}"
                )
            if isinstance(item, PrefillChunk):
                self._committed[item.slot] = item.start + len(item.token_ids)
                if item.checkpoint >= 0:
                    self._saved[item.checkpoint] = self._committed[item.slot]
