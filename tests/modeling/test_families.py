"""How tensors are divided among ranks: every entry held, none twice unless it is meant to be shared."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.errors import CheckpointError
from modeling.families import FAMILIES, shard_map
from modeling.shards import REPLICATED, Section, Shard
from modeling.target_config import TargetConfig

TEXT = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "n_shared_experts": 1,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
LATENT = ("deepseek_v3", "kimi_k2")


def target(family: str, **text: int) -> TargetConfig:
    return TargetConfig(Path("target"), family, 250, 64, 2, 512, False, {**TEXT, **text})


@given(units=st.integers(1, 40), width=st.integers(1, 8), size=st.integers(1, 16), uneven=st.booleans())
def test_parts_tile_a_section_in_rank_order(units, width, size, uneven):
    section = Section(units, width, uneven=uneven)
    if not uneven and units % size:
        with pytest.raises(CheckpointError):
            section.part(0, size)
        return
    parts = [section.part(rank, size) for rank in range(size)]
    assert parts[0][0] == 0
    assert parts[-1][1] == units * width
    assert all(left[1] == right[0] for left, right in pairwise(parts))


@given(units=st.integers(1, 8), copies=st.integers(1, 8), width=st.integers(1, 8))
def test_a_shared_unit_is_held_by_neighbouring_ranks(units, copies, width):
    section = Section(units, width, shared=True)
    for rank in range(units * copies):
        assert section.part(rank, units * copies) == (rank // copies * width, (rank // copies + 1) * width)


def test_a_fused_tensor_is_divided_section_by_section():
    shard = Shard(0, (Section(4, 2), Section(2, 3)))
    assert shard.slices((14, 5), rank=1, size=2) == [(slice(4, 8),), (slice(11, 14),)]


def test_a_shape_that_the_configuration_does_not_imply_is_refused():
    with pytest.raises(CheckpointError, match=r"shape \(6, 4\), but config.json implies 8 along dimension 0"):
        Shard(0, (Section(8),)).slices((6, 4), 0, 2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_norms_are_replicated_and_the_head_is_divided_by_vocabulary(family):
    shards = shard_map(target(family), 2)
    assert shards.of("layers.0.input_layernorm.weight") is REPLICATED
    assert shards.of("norm.weight") is REPLICATED
    assert shards.of("lm_head.weight").slices((250, 64), 1, 2) == [(slice(125, 250),)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_projections_of_any_layer_are_divided(family):
    shards = shard_map(target(family), 2)
    assert shards.of("layers.11.self_attn.o_proj.weight").slices((64, 128), 1, 2) == [(slice(None), slice(64, 128))]
    if family not in LATENT:
        assert shards.of("layers.11.self_attn.k_proj.weight").slices((32, 64), 1, 2) == [(slice(16, 32),)]


@pytest.mark.parametrize("family", LATENT)
def test_latent_attention_divides_heads_and_replicates_what_makes_latents(family):
    shards = shard_map(target(family), 4)
    assert shards.of("layers.1.self_attn.q_b_proj.weight").slices((192, 24), 1, 4) == [(slice(48, 96),)]
    assert shards.of("layers.1.self_attn.kv_b_proj.weight").slices((256, 32), 3, 4) == [(slice(192, 256),)]
    for name in ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"):
        assert shards.of(f"layers.1.self_attn.{name}.weight") is REPLICATED


def test_a_fused_and_interleaved_delta_net_is_divided_by_key_head():
    shards = shard_map(target("qwen3_next"), 2)
    assert shards.of("layers.0.linear_attn.in_proj_qkvz.weight").slices((256, 64), 1, 2) == [(slice(128, 256),)]
    assert shards.of("layers.0.linear_attn.in_proj_ba.weight").slices((16, 64), 1, 2) == [(slice(8, 16),)]


def test_interleaved_gates_stay_with_their_values():
    shards = shard_map(target("gpt_oss"), 2)
    whole = slice(None)
    assert shards.of("layers.0.mlp.experts.gate_up_proj").slices((4, 64, 192), 1, 2) == [(whole, whole, slice(96, 192))]
    assert shards.of("layers.0.mlp.experts.gate_up_proj_bias").slices((4, 192), 0, 2) == [(whole, slice(0, 96))]
    assert shards.of("layers.0.mlp.experts.down_proj").slices((4, 96, 64), 0, 2) == [(whole, slice(0, 48))]
    assert shards.of("layers.0.self_attn.sinks").slices((8,), 1, 2) == [(slice(4, 8),)]


def test_kv_heads_fewer_than_ranks_are_held_where_their_query_heads_are():
    key = shard_map(target("llama"), 4).of("layers.0.self_attn.k_proj.weight")
    assert [key.slices((32, 64), rank, 4) for rank in range(4)] == [
        [(slice(0, 16),)],
        [(slice(0, 16),)],
        [(slice(16, 32),)],
        [(slice(16, 32),)],
    ]


def test_the_delta_nets_fused_projection_keeps_heads_together():
    fused = shard_map(target("qwen3_5_moe_text"), 2).of("layers.0.linear_attn.conv1d.weight")
    assert fused.slices((192, 1, 4), 1, 2) == [(slice(32, 64),), (slice(96, 128),), (slice(160, 192),)]


def test_a_size_that_does_not_divide_the_heads_is_refused_with_the_choices():
    with pytest.raises(CheckpointError, match=r"size 3 does not divide num_attention_heads = 8 .* 1, 2, 4, 8"):
        shard_map(target("llama"), 3)


def test_a_size_that_does_not_fit_the_kv_heads_is_refused():
    with pytest.raises(CheckpointError, match="neither divides nor is a multiple of num_key_value_heads = 3"):
        shard_map(target("llama", num_key_value_heads=3), 2)
