"""Executes plans over torch's operations: transformers' layers, caches and states behind them. Runs anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from verifier_service.model import touchpoints
from verifier_service.model.face import ForwardOutput
from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.kv_storage import KvStorage, held_by
from verifier_service.model.loading import RankModel
from verifier_service.model.recurrent_state import RecurrentStates, Replay
from verifier_service.model.rotary import RotaryTable
from verifier_service.model.step import StepBuilder
from verifier_service.model.taken import filled
from verifier_service.plan import StepPlan


class TorchExecutor:
    """Implements executor.Executor. first: whether this is rank 0. replay: as in Forms."""

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
        replay: Replay,
    ):
        self.counters: Mapping[str, float] = {}
        self._model, self._tables, self._first, self._vocabulary = model, tables, first, vocabulary
        caches, latents = storage.layers(model.kv_shapes), storage.latents(model.latent_shapes)
        self._states = _states(model, storage, num_slots, checkpoint_bytes, replay)
        self.checkpoints = None if self._states is None else self._states.checkpoints
        self.cache_bytes = held_by([*caches.values(), *latents.values()])
        self._rotary = RotaryTable(model.rotary, storage.dtype, storage.device)
        self._builder = StepBuilder(
            tables,
            caches,
            latents,
            self._states,
            windows=model.windows,
            max_context=max_context,
            dtype=storage.dtype,
            device=storage.device,
        )

    def execute(self, plan: StepPlan, taps: Sequence[int], taken: torch.Tensor | None) -> ForwardOutput:
        self._apply(plan)
        if not plan.verify and not plan.prefill:
            return ForwardOutput(self._no_logits() if self._first else None, None)
        step = self._builder.build(plan)
        rope = self._rotary.rows(step.positions, step.longest_context)
        token_ids = step.token_ids if taken is None else filled(step.token_ids, taken)
        hidden = self._model.embedding.index_select(0, token_ids)[None]
        tapped: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._model.layers):
            hidden = touchpoints.run_layer(layer, hidden, rope, step)
            if self._first and index in taps:
                tapped[index] = hidden[0]
        rows = hidden[0] if step.logit_rows is None else hidden[0].index_select(0, step.logit_rows)
        logits = self._model.head(self._model.norm(rows)) if len(rows) else self._no_logits()
        return ForwardOutput(
            logits=logits if self._first else None,
            taps=torch.cat([tapped[layer] for layer in taps], dim=-1) if tapped else None,
        )

    def _apply(self, plan: StepPlan) -> None:
        if self._states is not None and (plan.decided or plan.saved):
            self._states.commit(dict(plan.decided), plan.saved)
        for slot in plan.released:
            self._tables.release(slot)
        for slot, block in plan.new_blocks:
            self._tables.append(slot, block)
        if self._states is not None:
            if plan.restored:
                self._states.restore(plan.restored)
            if plan.verify:
                self._states.begin_verify([row.slot for row in plan.verify])

    def _no_logits(self) -> torch.Tensor:
        return torch.empty(0, self._vocabulary, device=self._model.embedding.device)


def _states(
    model: RankModel, storage: KvStorage, slots: int, checkpoint_bytes: int, replay: Replay
) -> RecurrentStates | None:
    if not model.recurrent:
        return None
    return RecurrentStates(
        len(model.recurrent),
        slots,
        checkpoint_bytes=checkpoint_bytes,
        max_checkpoints=storage.blocks,
        replay=replay,
        **state_shape(model, storage),
    )


def state_shape(model: RankModel, storage: KvStorage) -> dict[str, Any]:
    """What RecurrentStates wants to know of a hybrid model."""
    layer = model.recurrent[0]
    return {
        "window": layer.kernel - 1,
        "channels": layer.channels,
        "heads": layer.heads,
        "key_dim": layer.key_dim,
        "value_dim": layer.value_dim,
        "dtype": storage.dtype,
        "device": storage.device,
    }
