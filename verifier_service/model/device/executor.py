"""Executes plans over kernels: one copy to the device a step, and launches that wait for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from kernels.paged_attention.batch import PagedBatch
from kernels.step_inputs.kernel import step_inputs
from verifier_service.model.device.inputs import InputWriter, StepInputs
from verifier_service.model.device.layer import KernelLayer
from verifier_service.model.device.layout import FixedInputs
from verifier_service.model.device.norm import KernelNorm
from verifier_service.model.device.rotary import whole_rotary
from verifier_service.model.device.states import KernelStates
from verifier_service.model.device.step import DeviceStep, VerifyRows, cache_tensors
from verifier_service.model.face import ForwardOutput
from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.kv_storage import KvStorage, held_by
from verifier_service.model.loading import RankModel
from verifier_service.model.step import PrefillPart
from verifier_service.model.torch_executor import state_shape
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow


@dataclass(frozen=True)
class Computed:
    """What a forward leaves on the device. logits float32 [rows, vocabulary], taps [tokens, taps x hidden], both with
    rows of padding at the end; None on ranks other than 0, and taps if there are none.
    """

    logits: torch.Tensor | None
    taps: torch.Tensor | None


class KernelExecutor:
    """Implements executor.Executor over a model of KernelLayers. first: whether this is rank 0.

    max_verify: tokens of a step's verify rows, at most.
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
        max_verify: int,
    ):
        self._model, self._first, self._vocabulary = model, first, vocabulary
        self._layers = cast(tuple[KernelLayer, ...], model.layers)
        self._norm = cast(KernelNorm, model.norm)
        self._max_context, self._block_tokens = max_context, storage.block_tokens
        self._device = torch.device(storage.device)
        caches = storage.layers(model.kv_shapes)
        self._caches = {layer: cache_tensors(cache) for layer, cache in caches.items()}
        self.cache_bytes = held_by(caches.values())
        self._states = _states(model, storage, num_slots, checkpoint_bytes, max_verify)
        self.checkpoints = None if self._states is None else self._states.checkpoints
        self._cos, self._sin = whole_rotary(model.rotary, max_context, storage.dtype, self._device)
        max_blocks = -(-max_context // storage.block_tokens)
        self._tables = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=self._device)
        self._taken = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._writer = InputWriter(tables, max_blocks, self._device)

    def execute(self, plan: StepPlan, taps: Sequence[int]) -> ForwardOutput:
        fixed, changing = self._writer.layouts(plan, None)
        inputs = self._writer.write(plan, fixed, changing)
        self._settle(plan, inputs)
        if not plan.verify and not plan.prefill:
            return ForwardOutput(self._no_logits() if self._first else None, None)
        work: list[VerifyRow | PrefillChunk] = [*plan.verify, *plan.prefill]
        longest = max(item.start + len(item.token_ids) for item in work)
        computed = self._compute(
            inputs.fixed,
            len(plan.verify),
            _prefill_parts(plan),
            longest,
            taps,
            inputs.changing.logit_rows if plan.prefill else None,
        )
        return ForwardOutput(computed.logits, computed.taps)

    def _settle(self, plan: StepPlan, inputs: StepInputs) -> None:
        """What happens before the forward: commits, checkpoints, block tables."""
        if self._states is not None:
            self._states.settle(inputs.changing)
        if plan.new_blocks:
            self._tables.view(-1).index_copy_(0, inputs.changing.cells.long(), inputs.changing.blocks)
        if self._states is not None and plan.restored:
            self._states.restore(plan.restored)

    def _compute(
        self,
        inputs: FixedInputs[torch.Tensor],
        verify: int,
        prefill: tuple[PrefillPart, ...],
        longest: int,
        taps: Sequence[int],
        logit_rows: torch.Tensor | None,
    ) -> Computed:
        """verify: how many of the requests, at the front, are verify rows. longest: no token lies at or past it.

        logit_rows: None for all of them.
        """
        starts = inputs.query_starts
        places = step_inputs(
            *(inputs.token_ids, inputs.starts, starts, inputs.slots, self._tables, self._taken),
            block_tokens=self._block_tokens,
        )
        batch = PagedBatch(self._tables.index_select(0, inputs.slots), starts, places.context_lengths, longest)
        tokens = prefill[0].first if prefill else len(places.token_ids)
        step = DeviceStep(
            cos=self._cos.index_select(0, places.positions),
            sin=self._sin.index_select(0, places.positions),
            cache_rows=places.cache_rows,
            batch=batch,
            caches=self._caches,
            states=self._states,
            verify=VerifyRows(tokens, inputs.slots[:verify], starts[: verify + 1]) if verify else None,
            prefill=prefill,
        )
        output, residual = self._model.embedding.index_select(0, places.token_ids), None
        tapped: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._layers):
            normed, residual = layer.input_norm(output, residual)
            tapped[index - 1] = residual
            output, residual = layer(normed, residual, step)
        assert residual is not None, "a model has layers"
        last = len(self._layers) - 1
        if logit_rows is not None and last not in taps:
            output, residual = output.index_select(0, logit_rows), residual.index_select(0, logit_rows)
        normed, tapped[last] = self._norm(output, residual)
        if logit_rows is not None and last in taps:
            normed = normed.index_select(0, logit_rows)
        logits = self._model.head(normed) if len(normed) else self._no_logits()
        return Computed(
            logits=logits if self._first else None,
            taps=torch.cat([tapped[layer] for layer in taps], dim=-1) if self._first and taps else None,
        )

    def _no_logits(self) -> torch.Tensor:
        return torch.empty(0, self._vocabulary, device=self._device)


def _prefill_parts(plan: StepPlan) -> tuple[PrefillPart, ...]:
    parts = []
    at = sum(len(row.token_ids) for row in plan.verify)
    for chunk in plan.prefill:
        stop = at + len(chunk.token_ids)
        parts.append(PrefillPart(at, stop, chunk.slot, chunk.start == 0, chunk.checkpoint))
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
