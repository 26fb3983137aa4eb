"""One rank's target: executes step plans over paged KV and recurrent states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from modeling.deterministic import DeterministicOperations
from modeling.families import family_of, shard_map
from modeling.kv_dtype import KvDtype
from modeling.operations import Operations, TorchOperations
from modeling.ranks import join_ranks
from modeling.reader import CheckpointReader
from modeling.target_config import read_target_config
from modeling.weights import LoadProgress, RankWeights
from verifier_service.model import touchpoints
from verifier_service.model.face import ForwardOutput, ModelShape
from verifier_service.model.forms import DETERMINISTIC, FAST, Forms
from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.kv_storage import KvStorage, held_by
from verifier_service.model.loading import RankModel, load_rank
from verifier_service.model.recurrent_state import RecurrentStates
from verifier_service.model.rotary import RotaryTable
from verifier_service.model.step import StepBuilder
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow


class TargetRunner:
    """Implements face.Runner. Every rank of the group is given the same plans in the same order.

    num_blocks x block_tokens: KV capacity in tokens. kv_dtype: of the KV cache, "auto" = dtype. num_slots: running
    requests. max_context: None = the checkpoint's own limit. checkpoint_bytes: for checkpoints of recurrent state.
    deterministic: a token's logits do not depend on the rest of the step, nor on `size`, to the bit (on CPU).
    taps: see set_taps. progress: told of every tensor while weights load.
    Raises CheckpointError (a ValueError) for a checkpoint that cannot be served on `size` ranks.
    """

    def __init__(
        self,
        target_dir: str | Path,
        *,
        rank: int = 0,
        size: int = 1,
        group: dist.ProcessGroup | None = None,
        num_blocks: int,
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
    ):
        config = read_target_config(target_dir)
        family = family_of(config)
        shards = shard_map(config, size)
        self._ranks = join_ranks(rank, size, group, device)
        with CheckpointReader(target_dir) as reader, torch.inference_mode():
            weights = RankWeights(
                reader, config, shards, rank=rank, size=size, dtype=dtype, device=device, progress=progress
            )
            operations: Operations = DeterministicOperations(dtype, size) if deterministic else TorchOperations()
            forms = DETERMINISTIC if deterministic else FAST
            empty = touchpoints.empty_model(config, dtype, forms.attention)
            self._model = load_rank(empty, weights, family, self._ranks, operations, forms)
        self.weight_bytes = weights.bytes
        limit = min(config.max_context, max_context or config.max_context)
        with torch.inference_mode():
            storage = KvStorage(num_blocks, block_tokens, kv_dtype, dtype, device)
            caches = storage.layers(self._model.kv_shapes)
            latents = storage.latents(self._model.latent_shapes)
            self._states = _states(self._model, forms, num_slots, dtype, device, checkpoint_bytes, num_blocks)
        self._rotary = RotaryTable(self._model.rotary, dtype, device)
        self._tables = BlockTables(num_slots, -(-limit // block_tokens), block_tokens, num_blocks)
        self._builder = StepBuilder(
            self._tables,
            caches,
            latents,
            self._states,
            windows=self._model.windows,
            max_context=limit,
            dtype=dtype,
            device=device,
        )
        checkpoints = None if self._states is None else self._states.checkpoints
        self._committed = [0] * num_slots  # tokens in each slot's recurrent state
        self._saved = [0] * (checkpoints or 0)  # tokens in each checkpoint
        self.shape = ModelShape(
            vocabulary=config.vocabulary,
            hidden=config.hidden,
            max_context=limit,
            kv_bytes_per_token=held_by([*caches.values(), *latents.values()]) // (num_blocks * block_tokens),
            checkpoints=checkpoints,
        )
        self._taps: tuple[int, ...] = ()
        self.set_taps(taps)

    def set_taps(self, layer_ids: Sequence[int]) -> None:
        """0-based layer outputs to return as taps; empty = none. Raises ValueError for a layer that does not exist."""
        layers = len(self._model.layers)
        wrong = [layer for layer in layer_ids if not 0 <= layer < layers]
        if wrong:
            raise ValueError(f"tap layers {wrong} do not exist: the target has layers 0..{layers - 1}")
        self._taps = tuple(layer_ids)

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> ForwardOutput:
        """Execute a plan, commit of `decided` included. Blocks until the result is there.

        Raises RuntimeError for a plan that contradicts the slots' state (a bug of the planner).
        """
        self._apply(plan)
        first = self._ranks.rank == 0
        if not plan.verify and not plan.prefill:
            return ForwardOutput(self._no_logits() if first else None, None)
        self._follow(plan)
        step = self._builder.build(plan)
        rope = self._rotary.rows(step.positions, step.longest_context)
        hidden = self._model.embedding.index_select(0, step.token_ids)[None]
        taps: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._model.layers):
            hidden = touchpoints.run_layer(layer, hidden, rope, step)
            if first and index in self._taps:
                taps[index] = hidden[0]
        rows = hidden[0] if step.logit_rows is None else hidden[0].index_select(0, step.logit_rows)
        logits = self._model.head(self._model.norm(rows)) if len(rows) else self._no_logits()
        return ForwardOutput(
            logits=logits if first else None,
            taps=torch.cat([taps[layer] for layer in self._taps], dim=-1) if taps else None,
        )

    def _apply(self, plan: StepPlan) -> None:
        if self._states is not None and (plan.decided or plan.saved):
            self._states.commit(dict(plan.decided), plan.saved)
        for slot, kept, checkpoint in plan.saved:
            self._saved[checkpoint] = self._committed[slot] + kept
        for slot, kept in plan.decided:
            self._committed[slot] += kept
        for slot in plan.released:
            self._tables.release(slot)
            self._committed[slot] = 0
        for slot, block in plan.new_blocks:
            self._tables.append(slot, block)
        if self._states is not None:
            if plan.restored:
                self._states.restore(plan.restored)
                for slot, checkpoint in plan.restored:
                    self._committed[slot] = self._saved[checkpoint]
            if plan.verify:
                self._states.begin_verify([row.slot for row in plan.verify])

    def _follow(self, plan: StepPlan) -> None:
        """A recurrent state knows one position only: going on from another would be silently wrong."""
        work: list[VerifyRow | PrefillChunk] = [*plan.verify, *plan.prefill]
        for item in work:
            if item.start and item.start != self._committed[item.slot] and self._states is not None:
                raise RuntimeError(
                    f"slot {item.slot} holds the state of {self._committed[item.slot]} tokens, but the plan of step "
                    f"{plan.step} goes on at {item.start}"
                )
            if isinstance(item, PrefillChunk):
                self._committed[item.slot] = item.start + len(item.token_ids)
                if item.checkpoint >= 0:
                    self._saved[item.checkpoint] = self._committed[item.slot]

    def _no_logits(self) -> torch.Tensor:
        return torch.empty(0, self.shape.vocabulary, device=self._model.embedding.device)


def _states(
    model: RankModel,
    forms: Forms,
    slots: int,
    dtype: torch.dtype,
    device: str,
    checkpoint_bytes: int,
    max_checkpoints: int,
) -> RecurrentStates | None:
    if not model.recurrent:
        return None
    layer = model.recurrent[0]
    return RecurrentStates(
        len(model.recurrent),
        slots,
        window=layer.kernel - 1,
        channels=layer.channels,
        heads=layer.heads,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        dtype=dtype,
        device=device,
        checkpoint_bytes=checkpoint_bytes,
        max_checkpoints=max_checkpoints,
        replay=forms.replay,
    )
