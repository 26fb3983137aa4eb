"""The target's layers over one step's inputs on the device. Launches only: nothing here waits, or looks at contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from kernels.kept_rows import KeptRows
from kernels.paged_batch import PagedBatch
from kernels.step_inputs.kernel import step_inputs
from verifier_service.model.device.attended import Attended, attended
from verifier_service.model.device.buckets import SECTIONED_ROWS
from verifier_service.model.device.forms import KernelForms
from verifier_service.model.device.latent_attention import KernelLatentAttention
from verifier_service.model.device.latent_runs import latent_runs
from verifier_service.model.device.layer import KernelLayer
from verifier_service.model.device.layout import FixedInputs
from verifier_service.model.device.norm import KernelNorm
from verifier_service.model.device.states import KernelStates, StateRows
from verifier_service.model.device.step import CacheTensors, DeviceStep, LatentTensors, prefill_runs
from verifier_service.model.loading import RankModel
from verifier_service.model.step import PrefillPart


@dataclass(frozen=True)
class Work:
    """What the host knows of a step. verify: how many of its requests, at the front, are verify rows; longest: no token
    lies at or past this position; padded: some tokens may be padding; logit_rows: int32 [any], the rows whose logits
    are wanted, None for all.
    """

    verify: int
    longest: int
    padded: bool = False
    prefill: tuple[PrefillPart, ...] = ()
    logit_rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Hidden:
    """normed [rows wanted, hidden]: what the head reads; taps [tokens, taps x hidden], None without."""

    normed: torch.Tensor
    taps: torch.Tensor | None


class KernelForward:
    """tables: int32 [slots, max_blocks], each slot's blocks. cos, sin [positions, rotary_dim]."""

    def __init__(
        self,
        model: RankModel,
        caches: dict[int, CacheTensors],
        latents: dict[int, LatentTensors],
        states: KernelStates | None,
        tables: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        block_tokens: int,
        forms: KernelForms,
    ):
        self._embedding = model.embedding
        self._layers = cast(tuple[KernelLayer, ...], model.layers)
        self._norm = cast(KernelNorm, model.norm)
        self._caches, self._latents, self._states, self._tables = caches, latents, states, tables
        self._cos, self._sin = rotary
        self._block_tokens, self._forms = block_tokens, forms
        mixers = [layer.mixer for layer in self._layers if isinstance(layer.mixer, KernelLatentAttention)]
        self._expands = mixers[0].expands if mixers else None  # all layers are of one shape

    def run(self, inputs: FixedInputs[torch.Tensor], taken: torch.Tensor, work: Work, taps: Sequence[int]) -> Hidden:
        """taken: int64, the tokens that the step before took, for those of this step that the host does not know."""
        starts = inputs.query_starts
        places = step_inputs(
            *(inputs.token_ids, inputs.starts, starts, inputs.slots, self._tables, taken),
            block_tokens=self._block_tokens,
        )
        tables = self._tables.index_select(0, inputs.slots)
        rows = len(places.token_ids)
        batch = PagedBatch(tables, starts, places.context_lengths, work.longest)
        verified = work.prefill[0].first if work.prefill else rows
        step = DeviceStep(
            cos=self._cos.index_select(0, places.positions),
            sin=self._sin.index_select(0, places.positions),
            cache_rows=places.cache_rows,
            live=places.cache_rows >= 0 if work.padded else None,
            attended=self._attended(batch, rows),
            latent_runs=(
                latent_runs(batch, work.verify, work.prefill, self._expands, self._attended)
                if self._expands is not None and work.prefill
                else ()
            ),
            caches=self._caches,
            latents=self._latents,
            states=self._states,
            verify=_verify_rows(inputs, work.verify, verified) if work.verify else None,
            prefill_runs=prefill_runs(work.prefill, work.verify, inputs.slots, starts) if work.prefill else (),
        )
        output, residual = self._embedding.index_select(0, places.token_ids), None
        tapped: dict[int, torch.Tensor] = {}  # the sum of what a layer returns is made by the norm after it
        for index, layer in enumerate(self._layers):
            normed, residual = layer.input_norm(output, residual)
            tapped[index - 1] = residual if index - 1 in taps else residual[:0]
            output, residual = layer(normed, residual, step)
        assert residual is not None, "a model has layers"
        last = len(self._layers) - 1
        wanted = work.logit_rows
        if wanted is not None and last not in taps:
            output, residual, wanted = output.index_select(0, wanted), residual.index_select(0, wanted), None
        normed, tapped[last] = self._norm(output, residual) if len(output) else (output, residual)
        return Hidden(
            normed if wanted is None else normed.index_select(0, wanted),
            torch.cat([tapped[layer] for layer in taps], dim=-1) if taps else None,
        )

    def _attended(self, batch: PagedBatch, rows: int) -> Attended:
        return attended(batch, rows, self._forms.section, SECTIONED_ROWS)


def _verify_rows(inputs: FixedInputs[torch.Tensor], rows: int, tokens: int) -> StateRows:
    kept = KeptRows(inputs.kept_first[:rows], inputs.kept_standing[:rows], inputs.kept_into[:rows])
    return StateRows(tokens, inputs.slots[:rows], inputs.query_starts[: rows + 1], kept)
