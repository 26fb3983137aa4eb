"""The DFlash model on the Triton kernels: the arithmetic of `fused` and of the output head in a fixed row of launches.

Nothing here waits for the device or depends on a tensor's contents, so that a forward can be captured in a CUDA graph.
Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from drafter_service.loading import LoadedDrafter
from drafter_service.pool import ContextPool
from drafter_service.step_buffers import StepAnswers, StepInputs
from kernels.block_attention.batch import BlockBatch
from kernels.block_attention.kernel import block_attention
from kernels.block_conv.kernel import convolve_block
from kernels.candidate_selector.kernel import select_path
from kernels.context_inject.kernel import inject_block, inject_context
from kernels.context_inject.reference import Rotation
from kernels.draft_head.choice import HeadShape
from kernels.draft_head.kernel import draft_candidates, draft_head
from kernels.gated_activation.kernel import gated_activation
from kernels.rms_norm.kernel import rms_norm
from modeling.copies import to_device
from modeling.dflash import SLIDING

SPREAD_BELOW = 128  # programs: about as many as a large GPU has multiprocessors; with fewer, some would be idle


class KernelDFlash:
    """A loaded drafter over its pool. Under `torch.inference_mode`."""

    def __init__(self, loaded: LoadedDrafter, pool: ContextPool, rotation: Rotation):
        assert loaded.head_weight is not None, "load_drafter keeps the head's weight where the kernels are used"
        self._loaded, self._model, self._pool = loaded, loaded.model, pool
        self._head: Tensor = loaded.head_weight
        self._head_shape = HeadShape(loaded.output_multiplier, loaded.softcap)
        self._rotation = rotation
        config, model = loaded.config, loaded.model
        self._sliding = [config.sliding_window if kind == SLIDING else None for kind in config.layer_types]
        self._norms = [layer.input_norm for layer in model.layers[1:]] + [model.norm]  # the one behind each layer

    def forward(self, step: StepInputs, answers: StepAnswers) -> None:
        """Draft tokens and their probabilities for the rows that are asked for."""
        loaded, model, pool = self._loaded, self._model, self._pool
        batch = BlockBatch(step.starts, step.first_rows, step.held, step.bases, loaded.config.block_size, pool.window)
        spread = batch.blocks * model.kv_heads < SPREAD_BELOW
        hidden = F.embedding(step.token_ids, loaded.embedding)  # [rows, hidden]
        if loaded.embedding_scale != 1.0:
            hidden = hidden * loaded.embedding_scale
        normed, hidden = rms_norm(hidden, model.layers[0].input_norm, model.eps)
        for index, layer in enumerate(model.layers):
            if (conv := layer.attention_conv) is not None:
                mixing = conv.weights(normed)
                normed = convolve_block(normed, mixing[:, 0], conv.base[0], step.places)
            qkv = layer.qkv(normed).view(len(normed), -1, model.head_dim)
            query = inject_block(
                qkv,
                layer.query_norm,
                layer.key_norm,
                step.positions,
                step.rows,
                self._rotation,
                model.eps,
                pool.kv[index],
            )
            seen = block_attention(
                query,
                pool.kv[index],
                pool.positions,
                batch,
                scaling=model.head_dim**-0.5,
                causal=loaded.config.causal[index],
                sliding_window=self._sliding[index],
                spread=spread,
            )
            out = layer.o(seen.flatten(1))
            if conv is not None:
                out = convolve_block(out, mixing[:, 1], conv.base[1], step.places)
            normed, hidden = rms_norm(out, layer.post_norm, model.eps, hidden)
            if (conv := layer.mlp_conv) is not None:
                mixing = conv.weights(normed)
                normed = convolve_block(normed, mixing[:, 0], conv.base[0], step.places)
            gated = gated_activation(layer.gate_up(normed))
            out = layer.down(gated)
            if conv is not None:
                out = convolve_block(out, mixing[:, 1], conv.base[1], step.places)
            normed, hidden = rms_norm(out, self._norms[index], model.eps, hidden)
        token_ids, confidence = self._read(normed.index_select(0, step.asked), step)
        answers.token_ids.copy_(token_ids)
        answers.confidence.copy_(confidence)

    def _read(self, normed: Tensor, step: StepInputs) -> tuple[Tensor, Tensor]:
        """Token and confidence of the rows that are asked for, [asked]."""
        selector = self._model.selector
        if selector is None:
            choice = draft_head(normed, self._head, shape=self._head_shape)
            return choice.token_ids, choice.probability()
        best = draft_candidates(normed, self._head, selector.top_k, shape=self._head_shape)
        blocks = step.bonus_tokens, step.asked_starts
        codebooks = selector.predecessors, selector.successors
        return select_path(best.token_ids, best.logits, selector.project(normed), *blocks, *codebooks)


class InjectedPool(ContextPool):
    """A context pool that is written by the kernel: a GEMM and one launch for all layers."""

    def __init__(self, loaded: LoadedDrafter, slots: int):
        super().__init__(loaded.model, slots, loaded.window)
        model = loaded.model
        self.rotation = Rotation(model.rotary.frequencies.to(model.device), model.rotary.scale)
        self._key_norms = torch.stack([layer.key_norm for layer in model.layers])  # [layers, head_dim]

    def _write(self, rows: np.ndarray, positions: np.ndarray, features: Sequence[Tensor]) -> None:
        model = self._model
        places, at = to_device(torch.from_numpy(np.stack([positions, rows])), model.device)
        projected = model.project_context(self._flat(features))
        target = self.kv, self.positions
        inject_context(projected, self._key_norms, places, at, self.rotation, model.eps, *target)
