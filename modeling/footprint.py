"""What a rank holds of a target, and what a token or a request adds to it: parameters and bytes. No torch.

Shapes are those of the loader's own empty model, divided by the loader's own shard map, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from modeling.families import ShardMap
from modeling.target_config import TargetConfig

Shapes = Mapping[str, tuple[int, ...]]  # by the tensor's name in the text model (`layers.0.mlp.down_proj.weight`)
Storage = Callable[[str, tuple[int, ...]], int]  # (name, a rank's shape of it) -> bytes it takes in memory

PARTS = ("embedding", "attention", "GDN", "experts", "shared experts", "router", "MLP", "norms", "head")

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what families call the number of routed experts
_STATE_BYTES = 4  # recurrent memory is kept in float32


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
    """token_bytes: of a token's keys and values (latents, with MLA) on one rank, all layers. copies: ranks that hold
    the same ones. state_bytes: of a request's recurrent state on one rank; state_total_bytes: on all ranks together.
    """

    token_bytes: int
    copies: int
    latent: bool
    layers: int
    state_bytes: int
    state_total_bytes: int


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
        for index, amount in enumerate((_count(shape), _count(held), storage(name, held))):
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


def cache_footprint(config: TargetConfig, shapes: Shapes, shards: ShardMap, size: int, itemsize: int) -> CacheFootprint:
    """itemsize: bytes of an element of the cache (the target's dtype; recurrent memory is float32 always)."""
    keys = dict(_held(shapes, shards, size, "self_attn.k_proj.weight"))
    values = dict(_held(shapes, shards, size, "self_attn.v_proj.weight"))
    latents = dict(_held(shapes, shards, size, "self_attn.kv_a_proj_with_mqa.weight"))
    width = sum(rows for rows, *_ in (*keys.values(), *values.values(), *latents.values()))
    kv_heads = config.integer("num_key_value_heads", config.integer("num_attention_heads"))
    copies = size if latents else max(1, size // kv_heads)
    state, states = (_state_bytes(config, shapes, shards, ranks, itemsize) for ranks in (size, 1))
    return CacheFootprint(width * itemsize, copies, bool(latents), len(keys) + len(latents), state, states)


def _state_bytes(config: TargetConfig, shapes: Shapes, shards: ShardMap, size: int, itemsize: int) -> int:
    """Convolution windows and memory of all Gated DeltaNet layers, of one of `size` ranks."""
    total = 0
    for _, (channels, _, kernel) in _held(shapes, shards, size, "linear_attn.conv1d.weight"):
        total += channels * (kernel - 1) * itemsize
    for _, (heads,) in _held(shapes, shards, size, "linear_attn.A_log"):
        total += heads * config.integer("linear_key_head_dim") * config.integer("linear_value_head_dim") * _STATE_BYTES
    return total


def _held(shapes: Shapes, shards: ShardMap, size: int, suffix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        if name.endswith(suffix):
            yield name, shards.of(name).part_shape(shape, 0, size)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
