"""The model families that Paceline serves: how each one's tensors are divided among tensor-parallel ranks.

A new family is one more entry in FAMILIES: a function from its configuration to the shards of its layers' tensors.
Names are those of transformers' text model, without the layer's prefix; what is not named is replicated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from modeling.errors import CheckpointError
from modeling.shards import REPLICATED, Section, Shard
from modeling.target_config import TargetConfig

Shards = dict[str, Shard]
_LAYER = re.compile(r"^layers\.\d+\.")


@dataclass(frozen=True)
class Family:
    """layer_shards: of a layer's tensors. zero_centered_norms: RMSNorm multiplies by 1 + weight.

    divisible: configuration keys that the TP size must divide; shared_by: keys that it may also be a multiple of.
    """

    layer_shards: Callable[[TargetConfig], Shards]
    divisible: tuple[str, ...]
    shared_by: tuple[str, ...] = ("num_key_value_heads",)
    zero_centered_norms: bool = False


@dataclass(frozen=True)
class ShardMap:
    """Shards of one target, by the tensor's name in the text model (`layers.0.mlp.down_proj.weight`)."""

    layers: Mapping[str, Shard]
    head: Shard

    def of(self, name: str) -> Shard:
        if name == "lm_head.weight":
            return self.head
        return self.layers.get(_LAYER.sub("", name), REPLICATED) if _LAYER.match(name) else REPLICATED


def family_of(config: TargetConfig) -> Family:
    """The family of a target. Raises CheckpointError with the supported ones if it is none of them."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CheckpointError(
            f"{config.file}: model_type {config.model_type!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return family


def shard_map(config: TargetConfig, size: int) -> ShardMap:
    """How `size` ranks divide this target. Raises CheckpointError if they cannot, naming the key that forbids it."""
    family = family_of(config)
    for key in family.divisible:
        units = config.integer(key)
        if units % size:
            raise CheckpointError(
                f"tensor_parallel_size {size} does not divide {key} = {units} of {config.directory}: "
                f"choose one of {', '.join(map(str, _divisors(units)))}"
            )
    for key in family.shared_by:
        units = config.integer(key, config.integer("num_attention_heads"))
        if units % size and size % units:
            raise CheckpointError(
                f"tensor_parallel_size {size} neither divides nor is a multiple of {key} = {units} of "
                f"{config.directory}: choose one of {', '.join(map(str, _divisors(units)))}"
            )
    head = Shard(0, (Section(config.vocabulary, uneven=True),))
    return ShardMap(layers=family.layer_shards(config), head=head)


def _attention(config: TargetConfig, query_width: int = 1) -> Shards:
    """Grouped-query attention, heads divided; query_width 2 = an output gate beside every query head."""
    heads = config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    dim = config.integer("head_dim", config.hidden // heads)
    query = Shard(0, (Section(heads, query_width * dim),))
    key = Shard(0, (Section(kv_heads, dim, shared=True),))
    shards = {f"self_attn.q_proj.{kind}": query for kind in ("weight", "bias")}
    shards |= {f"self_attn.{name}_proj.{kind}": key for name in ("k", "v") for kind in ("weight", "bias")}
    return shards | {"self_attn.o_proj.weight": Shard(1, (Section(heads, dim),))}


def _mlp(width: int, prefix: str = "mlp") -> Shards:
    rows = Shard(0, (Section(width),))
    return {
        f"{prefix}.gate_proj.weight": rows,
        f"{prefix}.gate_proj.bias": rows,
        f"{prefix}.up_proj.weight": rows,
        f"{prefix}.up_proj.bias": rows,
        f"{prefix}.down_proj.weight": Shard(1, (Section(width),)),
    }


def _experts(width: int) -> Shards:
    """A slice of every expert on every rank: gate_up_proj [experts, 2 x width, hidden], down_proj [.., .., width]."""
    return {
        "mlp.experts.gate_up_proj": Shard(1, (Section(width), Section(width))),
        "mlp.experts.down_proj": Shard(2, (Section(width),)),
    }


def _gated_delta_net(config: TargetConfig) -> Shards:
    """Linear attention, heads divided: the fused qkv and its convolution section by section.

    Qwen3-Next fuses further and interleaves: in_proj_qkvz and in_proj_ba hold one key head after the other, each with
    its query, key, values and gates.
    """
    key_heads, value_heads = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    key_dim, value_dim = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
    key, value = Section(key_heads, key_dim, shared=True), Section(value_heads, value_dim)
    per_head = Shard(0, (Section(value_heads),))
    values = value_heads // key_heads  # of one key head
    return {
        "linear_attn.in_proj_qkvz.weight": Shard(0, (Section(key_heads, 2 * key_dim + 2 * values * value_dim),)),
        "linear_attn.in_proj_ba.weight": Shard(0, (Section(key_heads, 2 * values),)),
        "linear_attn.in_proj_qkv.weight": Shard(0, (key, key, value)),
        "linear_attn.conv1d.weight": Shard(0, (key, key, value)),
        "linear_attn.in_proj_z.weight": Shard(0, (value,)),
        "linear_attn.in_proj_b.weight": per_head,
        "linear_attn.in_proj_a.weight": per_head,
        "linear_attn.A_log": per_head,
        "linear_attn.dt_bias": per_head,
        "linear_attn.out_proj.weight": Shard(1, (value,)),
    }


def _llama(config: TargetConfig) -> Shards:
    return _attention(config) | _mlp(config.integer("intermediate_size"))


def _qwen3_moe(config: TargetConfig) -> Shards:
    experts = _experts(config.integer("moe_intermediate_size"))
    return _attention(config) | _mlp(config.integer("intermediate_size")) | experts  # some layers may be dense


def _qwen3_next(config: TargetConfig) -> Shards:
    return _qwen3_5_moe(config) | _mlp(config.integer("intermediate_size"))  # some layers may be dense


def _qwen3_5(config: TargetConfig) -> Shards:
    return _attention(config, 2) | _gated_delta_net(config) | _mlp(config.integer("intermediate_size"))


def _qwen3_5_moe(config: TargetConfig) -> Shards:
    shared = _mlp(config.integer("shared_expert_intermediate_size"), "mlp.shared_expert")
    experts = _experts(config.integer("moe_intermediate_size"))
    return _attention(config, 2) | _gated_delta_net(config) | experts | shared


def _gpt_oss(config: TargetConfig) -> Shards:
    """Experts are [experts, in, out], gate and up interleaved; down_proj_bias is replicated, as o_proj's bias is."""
    pairs = Section(config.integer("intermediate_size"), 2)
    return _attention(config) | {
        "self_attn.sinks": Shard(0, (Section(config.integer("num_attention_heads")),)),
        "mlp.experts.gate_up_proj": Shard(2, (pairs,)),
        "mlp.experts.gate_up_proj_bias": Shard(1, (pairs,)),
        "mlp.experts.down_proj": Shard(1, (Section(config.integer("intermediate_size")),)),
    }


def _latent_attention(config: TargetConfig) -> Shards:
    """Multi-head latent attention: query heads divided; what makes the latents (q_a, kv_a) is replicated."""
    heads = config.integer("num_attention_heads")
    content, rotary, value = (config.integer(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query = Shard(0, (Section(heads, content + rotary),))
    return {
        "self_attn.q_proj.weight": query,  # where q_lora_rank is null
        "self_attn.q_b_proj.weight": query,
        "self_attn.kv_b_proj.weight": Shard(0, (Section(heads, content + value),)),
        "self_attn.o_proj.weight": Shard(1, (Section(heads, value),)),
    }


def _deepseek_v3(config: TargetConfig) -> Shards:
    width = config.integer("moe_intermediate_size")
    shared = _mlp(width * config.integer("n_shared_experts"), "mlp.shared_experts")
    dense = _mlp(config.integer("intermediate_size"))  # the first layers
    return _latent_attention(config) | dense | _experts(width) | shared


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


_DENSE = ("num_attention_heads", "intermediate_size")
_HYBRID = ("num_attention_heads", "linear_num_value_heads")
_HYBRID_SHARED = ("num_key_value_heads", "linear_num_key_heads")

# Latents are replicated: no KV heads to divide.
_DEEPSEEK_V3 = Family(_deepseek_v3, ("num_attention_heads", "intermediate_size", "moe_intermediate_size"), ())

FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,  # what published Kimi checkpoints call their text model
    "gpt_oss": Family(_gpt_oss, _DENSE),
    "llama": Family(_llama, _DENSE),
    "qwen3": Family(_llama, _DENSE),
    "qwen3_moe": Family(_qwen3_moe, ("num_attention_heads", "moe_intermediate_size")),
    "qwen3_next": Family(
        _qwen3_next,
        (*_HYBRID, "linear_num_key_heads", "moe_intermediate_size", "shared_expert_intermediate_size"),
        zero_centered_norms=True,
    ),
    "qwen3_5_text": Family(_qwen3_5, (*_HYBRID, "intermediate_size"), _HYBRID_SHARED, zero_centered_norms=True),
    "qwen3_5_moe_text": Family(
        _qwen3_5_moe,
        (*_HYBRID, "moe_intermediate_size", "shared_expert_intermediate_size"),
        _HYBRID_SHARED,
        zero_centered_norms=True,
    ),
}
