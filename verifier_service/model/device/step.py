"""What the layers of one forward share on the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from verifier_service.model.device.attended import Attended
from verifier_service.model.device.latent_runs import LatentRuns
from verifier_service.model.device.states import KernelStates, StateRows
from verifier_service.model.kv_cache import KeyValueCache, LatentCache, LatentsCache, LayerCache
from verifier_service.model.kv_storage import CastVectors, ScaledVectors, StoredLatentCache, StoredLayerCache, Vectors
from verifier_service.model.step import PrefillPart


@dataclass(frozen=True)
class CacheTensors:
    """One layer's keys and values as kernels take them: [blocks, block_tokens, kv_heads, head_dim]; scales
    [blocks, block_tokens, kv_heads] of an e4m3 cache, None of others.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


@dataclass(frozen=True)
class LatentTensors:
    """One layer's latents [blocks, block_tokens, latent] and rotary keys [blocks, block_tokens, rotary]; scales
    [blocks, block_tokens] of e4m3 latents.
    """

    latents: torch.Tensor
    rotary: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class PrefillRun:
    """Neighbouring chunks of different slots, and their tokens."""

    parts: tuple[PrefillPart, ...]
    rows: StateRows


@dataclass(frozen=True)
class DeviceStep:
    """cos, sin [tokens, rotary_dim]; cache_rows int64 [tokens], -1 for padding; live bool [tokens], None where there is
    no padding; caches and latents by layer; latent_runs: all rows, where some attend to latents in expanded form;
    prefill_runs: all prefill chunks, in order.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    cache_rows: torch.Tensor
    live: torch.Tensor | None
    attended: Attended
    latent_runs: LatentRuns
    caches: dict[int, CacheTensors]
    latents: dict[int, LatentTensors]
    states: KernelStates | None
    verify: StateRows | None
    prefill_runs: tuple[PrefillRun, ...]


def prefill_runs(
    prefill: tuple[PrefillPart, ...], verify: int, slots: torch.Tensor, starts: torch.Tensor
) -> tuple[PrefillRun, ...]:
    """slots [requests], starts [requests + 1]: of a step that begins with `verify` requests of other kind."""
    bounds = [0]
    seen: set[int] = set()
    for index, part in enumerate(prefill):
        if part.slot in seen:  # goes on where its state is after the chunk before
            bounds.append(index)
            seen.clear()
        seen.add(part.slot)
    runs = []
    for begin, end in pairwise([*bounds, len(prefill)]):
        parts, own = prefill[begin:end], slice(verify + begin, verify + end)
        first = parts[0].first
        # In memory of their own, for kernels are compiled for aligned addresses.
        rows = StateRows(parts[-1].stop - first, slots[own].clone(), starts[own.start : own.stop + 1] - first)
        runs.append(PrefillRun(parts, rows))
    return tuple(runs)


def cache_tensors(cache: KeyValueCache) -> CacheTensors:
    """The tensors that a cache of any dtype keeps."""
    if isinstance(cache, LayerCache):
        return CacheTensors(cache.keys, cache.values)
    assert isinstance(cache, StoredLayerCache), f"no kernel reads a {type(cache).__name__}"
    (keys, key_scales), (values, value_scales) = _stored(cache.keys), _stored(cache.values)
    return CacheTensors(keys, values, key_scales, value_scales)


def latent_tensors(cache: LatentsCache, latent: int) -> LatentTensors:
    """latent: the width of one."""
    if isinstance(cache, LatentCache):
        return LatentTensors(cache.latents[..., :latent], cache.latents[..., latent:])
    assert isinstance(cache, StoredLatentCache), f"no kernel reads a {type(cache).__name__}"
    (latents, scales), (rotary, _) = _stored(cache.latents), _stored(cache.rotary)
    return LatentTensors(latents, rotary, scales)


def _stored(vectors: Vectors) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(vectors, ScaledVectors):
        return vectors.codes.view(torch.float8_e4m3fn), vectors.scales
    assert isinstance(vectors, CastVectors), f"no kernel reads {type(vectors).__name__}"
    return vectors.stored, None
