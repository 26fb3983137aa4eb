"""KV caches in another dtype than the model computes in: written narrower, read back in the compute dtype.

A token's own step reads what it wrote, so that nothing depends on when a token came: drafted, prefilled, or found
in the prefix cache. What was dropped by rounding is dropped for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from modeling.kv_dtype import KvDtype, rotary_dtype
from verifier_service.model.kv_cache import KeyValueCache, LatentCache, LatentsCache, LayerCache

LARGEST = 448.0  # of float8_e4m3fn
EXPONENT = 0x7F800000  # the bits of a float32 that say which power of two it lies above
FLOAT16_BIAS = 256.0  # e4m3's bits, moved to a float16's places, mean the same number by 2 ** -8


class Vectors(Protocol):
    """One vector per token (and head): [blocks, block_tokens, ..., width], written in place."""

    def write(self, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        """Store vectors [tokens, ..., width] at `rows` [tokens] (block x block_tokens + offset)."""

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """The tokens of `blocks` [n], in order and in the compute dtype: [n x block_tokens, ..., width]."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class CastVectors:
    """Another float dtype, without scales. dtype: what is read."""

    stored: torch.Tensor
    dtype: torch.dtype

    def write(self, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        _write(self.stored, rows, vectors.to(self.stored.dtype))

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        return _read(self.stored, blocks).to(self.dtype)

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes


@dataclass(frozen=True)
class ScaledVectors:
    """float8_e4m3fn with a scale for each vector, as kernels.paged_attention takes them. dtype: what is read.

    codes: uint8 [blocks, block_tokens, ..., width], the bits of e4m3. scales: bfloat16 [blocks, block_tokens, ...], the
    smallest power of two that brings the vector within e4m3's range. Powers of two round nothing by themselves, so that
    an element's error is at most 1/16 of it (and 2 ** -17 of the vector's largest, where that is more).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    def write(self, rows: torch.Tensor, vectors: torch.Tensor) -> None:
        scales = scales_of(vectors)
        codes = (vectors / scales[..., None]).to(torch.float8_e4m3fn)
        _write(self.codes, rows, codes.view(torch.uint8))  # torch can index fp8 as bytes only
        _write(self.scales, rows, scales.to(self.scales.dtype))

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        vectors = decoded(_read(self.codes, blocks)).to(self.dtype)
        scales = _read(self.scales, blocks).float() * FLOAT16_BIAS
        return vectors.mul_(scales.to(self.dtype)[..., None])

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class StoredLayerCache:
    """As LayerCache."""

    keys: Vectors
    values: Vectors

    def write(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys.write(rows, keys)
        self.values.write(rows, values)

    def read(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys.read(blocks), self.values.read(blocks)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class StoredLatentCache:
    """As LatentCache; latents [.., width] are cut in two: their first `latent` values, and the rotary key."""

    latents: Vectors
    rotary: Vectors
    latent: int

    def write(self, rows: torch.Tensor, latents: torch.Tensor) -> None:
        self.latents.write(rows, latents[:, : self.latent])
        self.rotary.write(rows, latents[:, self.latent :])

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.latents.read(blocks), self.rotary.read(blocks)], dim=-1)

    @property
    def nbytes(self) -> int:
        return self.latents.nbytes + self.rotary.nbytes


@dataclass(frozen=True)
class KvStorage:
    """Makes the caches of one rank: `blocks` blocks of `block_tokens` tokens. dtype: the compute dtype."""

    blocks: int
    block_tokens: int
    kv_dtype: KvDtype
    dtype: torch.dtype
    device: str

    def layers(self, shapes: Mapping[int, tuple[int, int]]) -> dict[int, KeyValueCache]:
        """shapes: (kv_heads, head_dim) by layer."""
        if self._as_computed:
            return {layer: LayerCache(self._zeros(*shape), self._zeros(*shape)) for layer, shape in shapes.items()}
        make = self._vectors(self.kv_dtype)
        return {layer: StoredLayerCache(make(*shape), make(*shape)) for layer, shape in shapes.items()}

    def latents(self, shapes: Mapping[int, tuple[int, int]]) -> dict[int, LatentsCache]:
        """shapes: (latent, rotary key) by layer."""
        if self._as_computed:
            return {layer: LatentCache(self._zeros(latent + rotary)) for layer, (latent, rotary) in shapes.items()}
        make, make_rotary = self._vectors(self.kv_dtype), self._vectors(rotary_dtype(self.kv_dtype))
        return {
            layer: StoredLatentCache(make(latent), make_rotary(rotary), latent)
            for layer, (latent, rotary) in shapes.items()
        }

    @property
    def _as_computed(self) -> bool:
        return self.kv_dtype == "auto" or getattr(torch, self.kv_dtype, None) == self.dtype

    def _vectors(self, kv_dtype: KvDtype) -> Callable[..., Vectors]:
        if kv_dtype == "float8_e4m3":
            return self._scaled
        stored = getattr(torch, kv_dtype)
        return lambda *shape: CastVectors(self._zeros(*shape, dtype=stored), self.dtype)

    def _scaled(self, *shape: int) -> ScaledVectors:
        codes, scales = self._zeros(*shape, dtype=torch.uint8), self._zeros(*shape[:-1], dtype=torch.bfloat16)
        return ScaledVectors(codes, scales, self.dtype)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(self.blocks, self.block_tokens, *shape, dtype=dtype or self.dtype, device=self.device)


def held_by(caches: Iterable[KeyValueCache | LatentsCache]) -> int:
    """Bytes, scales included."""
    return sum(cache.nbytes for cache in caches)


def scales_of(vectors: torch.Tensor) -> torch.Tensor:
    """float32 [...]: of each vector of [..., width], the power of two by which its largest element is 224 to 448.

    An infinite or undefined element makes the scale infinite, and with it all that is read of the vector undefined.
    """
    largest = vectors.abs().amax(dim=-1).float().clamp_min(2.0**-100)
    return (largest * (2 / LARGEST)).view(torch.int32).bitwise_and_(EXPONENT).view(torch.float32)


def decoded(codes: torch.Tensor) -> torch.Tensor:
    """float16, 1 / 256 of what the e4m3 `codes` (uint8) stand for, subnormal numbers included.

    On CPU several times faster than torch's own conversion. Knows no NaN: those are in the scales.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)  # the sign is then in bits 14 and 15
    return bits.bitwise_and_(~0x4000).view(torch.float16)


def _write(cache: torch.Tensor, rows: torch.Tensor, vectors: torch.Tensor) -> None:
    cache.view(-1, *cache.shape[2:]).index_copy_(0, rows, vectors)


def _read(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    return cache.index_select(0, blocks).view(-1, *cache.shape[2:])
