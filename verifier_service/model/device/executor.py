"""Executes plans over kernels: one copy to the device a step, and launches that wait for nothing.

A step of verify rows alone is padded to a bucket, for which there is a CUDA graph; one with prefill chunks runs launch
by launch, in its own size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from modeling.copies import to_device
from verifier_service.model.device.buckets import Bucket, Buckets, buckets
from verifier_service.model.device.forms import FAST, KernelForms
from verifier_service.model.device.forward import Hidden, KernelForward, Work
from verifier_service.model.device.graphs import StepGraphs
from verifier_service.model.device.inputs import InputWriter, StepInputs
from verifier_service.model.device.layout import ChangingLayout, FixedLayout
from verifier_service.model.device.rotary import whole_rotary
from verifier_service.model.device.shard_sampling import ShardSampling
from verifier_service.model.device.states import KernelStates
from verifier_service.model.device.step import cache_tensors, latent_tensors
from verifier_service.model.face import ForwardOutput
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.kv_storage import KvStorage, held_by
from verifier_service.model.loading import RankModel
from verifier_service.model.step import PrefillPart
from verifier_service.model.torch_executor import state_shape
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

SPARE_WORDS = 4096  # of a graph's inputs, for what changes every step; a step that needs more runs launch by launch


class KernelExecutor:
    """Implements executor.Executor over a model of KernelLayers, made for `forms`. first: whether this is rank 0.

    What a step returns is its own: later steps leave it alone.
    """

    def __init__(
        self,
        model: RankModel,
        tables: BlockTables,
        storage: KvStorage,
        *,
        first: bool,
        vocabulary: int,
        num_slots: int,
        max_context: int,
        checkpoint_bytes: int,
        path: KernelPath,
        forms: KernelForms = FAST,
    ):
        self._head, self._first, self._vocabulary = model.head, first, vocabulary
        self._device = torch.device(storage.device)
        self._sampling = ShardSampling(model.head, by_shards=forms.shards)
        caches, latents = storage.layers(model.kv_shapes), storage.latents(model.latent_shapes)
        self.cache_bytes = held_by([*caches.values(), *latents.values()])
        most = path.rows(num_slots)
        self._states = _states(model, storage, num_slots, checkpoint_bytes, most)
        self.checkpoints = None if self._states is None else self._states.checkpoints
        held: tuple[int, int] = (0, 0) if self._states is None else self._states.held
        self.state_bytes, self.saved_bytes = held
        max_blocks = -(-max_context // storage.block_tokens)
        self._tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=self._device)
        self._writer = InputWriter(tables, max_blocks, self._device, kept=most if self._states is not None else 0)
        self._forward = KernelForward(
            model,
            {layer: cache_tensors(cache) for layer, cache in caches.items()},
            {layer: latent_tensors(cache, model.latent_shapes[layer][0]) for layer, cache in latents.items()},
            self._states,
            self._tables,
            whole_rotary(model.rotary, max_context, storage.dtype, self._device),
            storage.block_tokens,
            forms,
        )
        self.counters = Counter(graph_rows=0, graph_padding_rows=0, eager_steps=0, graph_failures=0)

        # Static: CUDA graphs know these by their addresses.
        self._sizes = found = buckets(num_slots, path.longest_row, most, max_context, forms.section)
        self._buckets = Buckets(found if path.graphs else [])
        words = max(FixedLayout(bucket.requests, bucket.rows).words for bucket in found)
        self._inputs = torch.zeros(words + SPARE_WORDS, dtype=torch.int32, device=self._device)
        self._taken = torch.zeros(most + num_slots, dtype=torch.int64, device=self._device)
        self._taps = path.taps if first else ()
        self._hidden = self._hidden_for(model, most)
        self._graphs = StepGraphs(self._run_bucket, self._device)
        self._graphs.capture_all(self._buckets.all)

    def execute(self, plan: StepPlan, taps: Sequence[int], taken: torch.Tensor | None) -> ForwardOutput:
        if taken is not None:
            self._taken[: len(taken)].copy_(taken)
        work: list[VerifyRow | PrefillChunk] = [*plan.verify, *plan.prefill]
        rows = sum(len(item.token_ids) for item in work)
        longest = max((item.start + len(item.token_ids) for item in work), default=0)
        changing = self._writer.changing(plan)
        bucket = None if plan.prefill else self._buckets.smallest(len(work), rows, longest)
        if not work:
            self._settle(plan, self._writer.write(plan, FixedLayout(0, 0), changing))
            return ForwardOutput(self._no_logits() if self._first else None, None)
        if bucket is not None and changing.words <= SPARE_WORDS:
            hidden = self._in_bucket(plan, bucket, changing, rows, taps)
        else:
            self.counters["eager_steps"] += 1
            inputs = self._writer.write(plan, FixedLayout(len(work), rows), changing)
            self._settle(plan, inputs)
            logit_rows = inputs.changing.logit_rows if plan.prefill else None
            asked = Work(len(plan.verify), longest, prefill=_prefill_parts(plan), logit_rows=logit_rows)
            hidden = self._forward.run(inputs.fixed, self._taken, asked, taps if self._first else ())
        if plan.draws is not None:
            late = [rows for rows in plan.shown if rows.late]
            tokens = self._sampling.take(hidden.normed, plan.draws, late)
            return ForwardOutput(self._shown(hidden.normed, plan), hidden.taps, tokens)
        logits = self._head(hidden.normed) if len(hidden.normed) else self._no_logits()
        return ForwardOutput(logits if self._first else None, hidden.taps)

    def rehearse(self) -> int:
        """Run what CUDA graphs would hold, launch by launch, over a step without rows; how many graphs there would be.

        For an executor without graphs, as it stands at the start. Collective.
        """
        for bucket in self._sizes:
            self._run_bucket(bucket)
        return len(self._sizes)

    def _shown(self, normed: torch.Tensor, plan: StepPlan) -> torch.Tensor | None:
        if not plan.shown:
            return None
        rows = torch.tensor([row for each in plan.shown for row in each.rows])
        return self._head(normed.index_select(0, to_device(rows, self._device)))

    def _in_bucket(
        self, plan: StepPlan, bucket: Bucket, changing: ChangingLayout, rows: int, taps: Sequence[int]
    ) -> Hidden:
        if self._first and taps and tuple(taps) != self._taps:
            self._taps = tuple(taps)
            self._hidden = self._hidden_of(self._hidden.normed)
            self._graphs.forget()
        self._settle(plan, self._writer.write(plan, FixedLayout(bucket.requests, bucket.rows), changing, self._inputs))
        self._graphs.run(bucket)
        self.counters["graph_rows"] += rows
        self.counters["graph_padding_rows"] += bucket.rows - rows
        self.counters["graph_failures"] = self._graphs.failures
        kept = self._hidden.taps
        return Hidden(self._hidden.normed[:rows], kept[:rows].clone() if kept is not None and taps else None)

    def _run_bucket(self, bucket: Bucket) -> None:
        """From the static inputs to the static outputs."""
        fixed = FixedLayout(bucket.requests, bucket.rows).of(self._inputs)
        made = self._forward.run(fixed, self._taken, Work(bucket.requests, bucket.context, padded=True), self._taps)
        self._hidden.normed[: bucket.rows].copy_(made.normed)
        if made.taps is not None and self._hidden.taps is not None:
            self._hidden.taps[: bucket.rows].copy_(made.taps)

    def _settle(self, plan: StepPlan, inputs: StepInputs) -> None:
        """What happens before the forward: commits, checkpoints, block tables, empty states of new prompts."""
        if self._states is not None:
            self._states.settle(inputs.changing)
        if plan.new_blocks:
            self._tables.view(-1).index_copy_(0, inputs.changing.cells.long(), inputs.changing.blocks)
        if self._states is not None and plan.restored:
            self._states.restore(plan.restored)
        if self._states is not None:
            self._states.clear(chunk.slot for chunk in plan.prefill if chunk.start == 0)

    def _hidden_for(self, model: RankModel, rows: int) -> Hidden:
        return self._hidden_of(model.embedding.new_zeros(rows, model.embedding.shape[1]))

    def _hidden_of(self, normed: torch.Tensor) -> Hidden:
        taps = normed.new_zeros(len(normed), len(self._taps) * normed.shape[1]) if self._taps else None
        return Hidden(normed, taps)

    def _no_logits(self) -> torch.Tensor:
        return torch.empty(0, self._vocabulary, device=self._device)


def _prefill_parts(plan: StepPlan) -> tuple[PrefillPart, ...]:
    parts = []
    at = sum(len(row.token_ids) for row in plan.verify)
    for chunk in plan.prefill:
        stop = at + len(chunk.token_ids)
        parts.append(PrefillPart(at, stop, chunk.slot, chunk.start, chunk.checkpoint))
        at = stop
    return tuple(parts)


def _states(
    model: RankModel, storage: KvStorage, slots: int, checkpoint_bytes: int, max_verify: int
) -> KernelStates | None:
    if not model.recurrent:
        return None
    return KernelStates(
        len(model.recurrent),
        slots,
        tokens=max_verify,
        key_heads=model.recurrent[0].key_heads,
        checkpoint_bytes=checkpoint_bytes,
        max_checkpoints=storage.blocks,
        **state_shape(model, storage),
    )
