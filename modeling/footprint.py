"""What a rank holds of a target, and what a token or a request adds to it: parameters and bytes. No torch.

Shapes are those of the loader's own empty model, divided by the loader's own shard map, so the two cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from modeling.families import ShardMap
from modeling.kv_dtype import KvDtype, latent_bytes, vector_bytes
from modeling.quantized.scheme import QuantScheme
from modeling.target_config import TargetConfig

Shapes = Mapping[str, tuple[int, ...]]  # by the tensor's name in the text model (`layers.0.mlp.down_proj.weight`)
Storage = Callable[[str, tuple[int, ...]], int]  # (name, a rank's shape of it) -> bytes it takes in memory

PARTS = ("embedding", "attention", "GDN", "experts", "shared experts", "router", "MLP", "norms", "head")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what families call the number of routed experts
_FLOAT32 = 4  # bytes; recurrent memory is kept so


@dataclass(frozen=True)
class Part:
    """One part of a target. rank_*: of the rank that holds the most (the first). replicated: on every rank, whole."""

    name: str
    parameters: int
    rank_parameters: int
    rank_bytes: int

    @property
    def replicated(self) -> bool:
        return self.rank_parameters == self.parameters


@dataclass(frozen=True)
class CacheFootprint:
    """Of one rank, all layers. token_bytes: keys and values (latents, with MLA) of a token; copies: ranks that hold
    the same ones. attended_flops: of a query's attention to one earlier token. state_bytes: a request's recurrent
    state; state_total_bytes: on all ranks together. replay_bytes: what a verify keeps of a token until its commit.
    """

    token_bytes: int
    copies: int
    latent: bool
    layers: int
    attended_flops: int
    state_bytes: int
    state_total_bytes: int
    replay_bytes: int


@dataclass(frozen=True)
class RoutedExperts:
    """`per_token` of `count` experts of a layer see a token."""

    count: int
    per_token: int

    def touched(self, tokens: float) -> float:
        """Expected number of a layer's experts that at least one of `tokens` tokens is routed to, if routing is even.

        An upper bound: real routing is skewed, and neighbouring tokens share experts.
        """
        return self.count * (1.0 - (1.0 - self.per_token / self.count) ** tokens)


def storage_of(scheme: QuantScheme | None, itemsize: int) -> Storage:
    """Matrices packed as the scheme says (they stay so in memory), all else with `itemsize` bytes an entry."""
    if scheme is None:
        return lambda name, shape: math.prod(shape) * itemsize
    return lambda name, shape: scheme.bytes(name, shape, itemsize)


def part_of(name: str) -> str:
    """Which of PARTS a tensor belongs to."""
    if name.startswith("embed_tokens."):
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    if name.endswith("norm.weight"):
        return "norms"
    if "linear_attn." in name:
        return "GDN"
    if "self_attn." in name:
        return "attention"
    if ".shared_expert" in name:
        return "shared experts"
    if ".experts." in name:
        return "experts"
    if ".mlp.gate." in name or ".router." in name:
        return "router"
    return "MLP"


def held_parts(shapes: Shapes, shards: ShardMap, size: int, storage: Storage) -> tuple[Part, ...]:
    """The parts of a target that has any, as `size` ranks hold them. Raises CheckpointError if they cannot."""
    totals = {name: [0, 0, 0] for name in PARTS}
    for name, shape in shapes.items():
        held = shards.of(name).part_shape(shape, 0, size)
        total = totals[part_of(name)]
        for index, amount in enumerate((math.prod(shape), math.prod(held), storage(name, held))):
            total[index] += amount
    return tuple(Part(name, *total) for name, total in totals.items() if total[0])


def routed_experts(config: TargetConfig) -> RoutedExperts | None:
    """None for a dense target. Raises CheckpointError if config.json does not say how many experts see a token."""
    count = next((config.integer(key) for key in _EXPERTS if config.text.get(key)), 0)
    return RoutedExperts(count, config.integer("num_experts_per_tok")) if count else None


def active_parameters(parts: tuple[Part, ...], experts: RoutedExperts | None) -> int:
    """Parameters that one token meets: all but the experts it is not routed to. The embedding counts, as in names."""
    share = experts.per_token / experts.count if experts else 1.0
    return round(sum(part.parameters * (share if part.name == "experts" else 1.0) for part in parts))


def cache_footprint(
    config: TargetConfig, shapes: Shapes, shards: ShardMap, size: int, itemsize: int, kv_dtype: KvDtype = "auto"
) -> CacheFootprint:
    """itemsize: bytes of an element in the target's dtype; recurrent memory is float32 always."""

    def held(suffix: str) -> list[tuple[int, ...]]:
        return [shards.of(name).part_shape(shape, 0, size) for name, shape in shapes.items() if name.endswith(suffix)]

    latents = held("self_attn.kv_a_proj_with_mqa.weight")
    heads = [*held("self_attn.k_proj.weight"), *held("self_attn.v_proj.weight")]
    outputs = sum(width for _, width in held("self_attn.o_proj.weight"))  # query heads x head_dim
    kv_heads = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    states = [_state(config, shapes, shards, ranks, itemsize) for ranks in (size, 1)]
    return CacheFootprint(
        token_bytes=sum(_head_bytes(config, rows, kv_dtype, itemsize) for rows, _ in heads)
        + sum(_latent_bytes(config, rows, kv_dtype, itemsize) for rows, _ in latents),
        copies=size if latents else max(1, size // kv_heads),
        latent=bool(latents),
        layers=len(held("self_attn.o_proj.weight")),
        attended_flops=_latent_flops(config, outputs) if latents else 4 * outputs,
        state_bytes=states[0][0],
        state_total_bytes=states[1][0],
        replay_bytes=states[0][1],
    )


def _head_bytes(config: TargetConfig, rows: int, kv_dtype: KvDtype, itemsize: int) -> int:
    """Of one token's keys (or values) of one layer's heads, of `rows` elements in all."""
    dim = config.integer("head_dim", config.hidden // config.integer("num_attention_heads"))
    return rows // dim * vector_bytes(dim, kv_dtype, itemsize)


def _latent_bytes(config: TargetConfig, rows: int, kv_dtype: KvDtype, itemsize: int) -> int:
    latent = config.integer("kv_lora_rank")
    return latent_bytes(latent, rows - latent, kv_dtype, itemsize)


def _latent_flops(config: TargetConfig, outputs: int) -> int:
    """Scores against latent and rotary part, then the weighted sum of latents, of every head."""
    latent, rotary = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    return 2 * outputs // config.integer("v_head_dim") * (2 * latent + rotary)


def _state(config: TargetConfig, shapes: Shapes, shards: ShardMap, size: int, itemsize: int) -> tuple[int, int]:
    """Bytes of all Gated DeltaNet layers on one of `size` ranks: (a request's state, a verified token's inputs).

    A state is convolution window and memory; of a token are kept the convolution's input, key, value and decay.
    """
    state = replay = 0
    for name, shape in shapes.items():
        if name.endswith("linear_attn.conv1d.weight"):
            channels, _, kernel = shards.of(name).part_shape(shape, 0, size)
            state += channels * (kernel - 1) * itemsize
            replay += channels * itemsize
        elif name.endswith("linear_attn.A_log"):
            (heads,) = shards.of(name).part_shape(shape, 0, size)
            key, value = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
            state += heads * key * value * _FLOAT32
            replay += heads * (key + value + 1) * _FLOAT32
    return state, replay
