"""Bytes of one rank of the target and of one drafter, against the memory of their GPUs. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass

from modeling.dflash_config import DFlashConfig
from modeling.families import shard_map
from modeling.footprint import CacheFootprint, Part, Shapes, Storage, cache_footprint, held_parts
from modeling.kv_dtype import KvDtype
from modeling.quantized.scheme import QuantScheme
from modeling.target_config import TargetConfig

RUNTIME_BYTES = 2 * 10**9  # CUDA context, NCCL buffers, graphs, the allocator's slack: assumed
ACTIVATIONS = 8  # vectors of the hidden size alive for each token of a step, beside its widest layer's: assumed
POSITION_BYTES = 8  # beside every row of context KV


@dataclass(frozen=True)
class TargetModel:
    """A target as sizing needs it. scheme: how its weights are packed, if they are; storage: the bytes they take."""

    config: TargetConfig
    shapes: Shapes
    scheme: QuantScheme | None
    storage: Storage
    itemsize: int
    kv_dtype: KvDtype = "auto"

    @property
    def packing(self) -> str:
        """For people: `FP8`."""
        return "/".join(packed.label for packed in self.scheme.formats) if self.scheme else "unquantized"

    def parts(self, size: int) -> tuple[Part, ...]:
        return held_parts(self.shapes, shard_map(self.config, size), size, self.storage)

    def cache(self, size: int) -> CacheFootprint:
        shards = shard_map(self.config, size)
        return cache_footprint(self.config, self.shapes, shards, size, self.itemsize, self.kv_dtype)


@dataclass(frozen=True)
class Limits:
    """What the deploy file sets for a verifier. block_size: the drafter's, 1 for plain decoding."""

    size: int
    kv_cache_tokens: int
    max_requests: int
    max_step_tokens: int
    checkpoint_bytes: int
    block_size: int

    @property
    def verified_tokens(self) -> int:
        """The most rows of logits of one step."""
        return min(self.max_step_tokens, self.max_requests * self.block_size)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the first rank, which holds the most: it alone has logits and the drafter's fc (or all of the drafter).

    available: of its GPU; None where it is not known.
    """

    weights: int
    drafter: int
    kv_cache: int
    states: int
    checkpoints: int
    working: int
    available: int | None

    @property
    def total(self) -> int:
        return self.weights + self.drafter + self.kv_cache + self.states + self.checkpoints + self.working

    @property
    def left(self) -> int | None:
        return None if self.available is None else self.available - self.total

    def kv_tokens(self, token_bytes: int) -> int | None:
        """KV capacity that the memory would hold beside all else, in tokens; negative if all else does not fit."""
        return None if self.left is None else (self.left + self.kv_cache) // token_bytes


def rank_memory(target: TargetModel, limits: Limits, drafter_bytes: int, available: int | None) -> RankMemory:
    """Raises CheckpointError if `limits.size` ranks cannot divide the target."""
    parts, cache = target.parts(limits.size), target.cache(limits.size)
    return RankMemory(
        weights=sum(part.rank_bytes for part in parts),
        drafter=drafter_bytes,
        kv_cache=limits.kv_cache_tokens * cache.token_bytes,
        states=limits.max_requests * cache.state_bytes,
        checkpoints=limits.checkpoint_bytes if cache.state_bytes else 0,
        working=_working(target, limits, cache),
        available=available,
    )


def _working(target: TargetModel, limits: Limits, cache: CacheFootprint) -> int:
    """Runtime, activations of a full step, a full verify's logits (bfloat16 parts and float32) and what two verifies
    keep for recurrent states."""
    config = target.config
    widest = max(
        int(config.text.get(key) or 0) for key in ("intermediate_size", "moe_intermediate_size", "hidden_size")
    )
    routed = int(config.text.get("num_experts_per_tok") or 1)
    activations = limits.max_step_tokens * (ACTIVATIONS * config.hidden + 2 * routed * widest // limits.size)
    logits = limits.verified_tokens * config.vocabulary * (target.itemsize + 4)
    return RUNTIME_BYTES + activations * target.itemsize + logits + 2 * limits.verified_tokens * cache.replay_bytes


@dataclass(frozen=True)
class DrafterModel:
    """Parameters of a DFlash drafter. shared: its target's embedding and head, which it keeps beside it.

    layers: with the selector's projection; codebooks: of the selector, both. Of DFlash 2, where there are any.
    """

    layers: int
    norms: int
    fc: int
    embedding: int
    head: int
    codebooks: int
    tied: bool
    block_size: int
    itemsize: int
    row_bytes: int  # of a token's context KV
    attended_flops: int  # of a block row's attention to one context token

    @property
    def bytes(self) -> int:
        """Held by a drafter process: fc is the verifier's."""
        held = self.layers + self.norms + self.codebooks + self.embedding + (0 if self.tied else self.head)
        return held * self.itemsize

    @property
    def fuser_bytes(self) -> int:
        """Held by the verifier's first rank."""
        return self.fc * self.itemsize


def drafter_model(config: DFlashConfig, tied: bool, itemsize: int) -> DrafterModel:
    """From the drafter's own configuration; tied: its target has one tensor for embedding and head."""
    raw, hidden = config.raw, config.hidden
    heads = int(raw["num_attention_heads"])
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    dim = int(raw.get("head_dim") or hidden // heads)
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    vocabulary = config.vocabulary * hidden
    convolutions = selector = codebooks = 0
    if (second := config.v2) is not None:
        convolutions = 4 * second.conv_kernel_size * hidden * (1 + hidden // second.conv_group_size)
        selector, codebooks = hidden * second.selector_rank, 2 * config.vocabulary * second.selector_rank
    return DrafterModel(
        layers=config.layers * (attention + 3 * hidden * int(raw["intermediate_size"]) + convolutions) + selector,
        norms=config.layers * 2 * (hidden + dim) + hidden,
        fc=len(config.target_layer_ids) * hidden * hidden + hidden,
        embedding=vocabulary,
        head=vocabulary,
        codebooks=codebooks,
        tied=tied,
        block_size=config.block_size,
        itemsize=itemsize,
        row_bytes=config.layers * 2 * kv_heads * dim * itemsize,
        attended_flops=config.layers * 4 * heads * dim,
    )


@dataclass(frozen=True)
class DrafterMemory:
    """Bytes of one drafter. context_bytes: of one draft context, its window and room for a block."""

    weights: int
    contexts: int
    context_bytes: int
    working: int
    available: int | None

    @property
    def total(self) -> int:
        return self.weights + self.contexts + self.working

    @property
    def left(self) -> int | None:
        return None if self.available is None else self.available - self.total

    @property
    def context_capacity(self) -> int | None:
        """Draft contexts that its memory would hold; negative if not even the weights fit."""
        return None if self.left is None else (self.left + self.contexts) // self.context_bytes


def drafter_memory(model: DrafterModel, window: int, max_contexts: int, available: int | None) -> DrafterMemory:
    """window: context rows kept of a request, in tokens."""
    context = (window + model.block_size) * (model.row_bytes + POSITION_BYTES)
    return DrafterMemory(model.bytes, max_contexts * context, context, RUNTIME_BYTES, available)
