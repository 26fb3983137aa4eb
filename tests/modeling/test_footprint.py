"""Bytes of a rank, a token and a request, against what the engine's own parts measure and what is published."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from modeling.families import shard_map
from modeling.footprint import RoutedExperts, cache_footprint, held_parts, part_of, storage_of
from modeling.quantized.scheme import scheme_of
from modeling.target_config import TargetConfig, read_target_config
from verifier_service.model.touchpoints import text_shapes

SHIPPED = Path(__file__).resolve().parents[2] / "deploy" / "architectures"
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny" / "target"


def config_of(name: str) -> TargetConfig:
    return read_target_config(SHIPPED / f"{name}.json")


def rank_bytes(name: str, size: int, *, packed: bool) -> dict[str, int]:
    config = config_of(name)
    scheme = scheme_of(config) if packed else None
    parts = held_parts(text_shapes(config), shard_map(config, size), size, storage_of(scheme, 2))
    return {part.name: part.rank_bytes for part in parts}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("embed_tokens.weight", "embedding"),
        ("layers.3.self_attn.q_norm.weight", "norms"),
        ("layers.3.self_attn.kv_a_proj_with_mqa.weight", "attention"),
        ("layers.3.linear_attn.A_log", "GDN"),
        ("layers.3.mlp.experts.gate_up_proj", "experts"),
        ("layers.3.mlp.shared_expert_gate.weight", "shared experts"),
        ("layers.3.mlp.shared_experts.up_proj.weight", "shared experts"),
        ("layers.3.mlp.gate.e_score_correction_bias", "router"),
        ("layers.3.mlp.router.bias", "router"),
        ("layers.3.mlp.gate_proj.weight", "MLP"),
        ("norm.weight", "norms"),
        ("lm_head.weight", "head"),
    ],
)
def test_every_tensor_belongs_to_a_part(name, part):
    assert part_of(name) == part


def test_what_all_ranks_hold_is_the_target_and_the_copies_of_what_is_replicated():
    config = read_target_config(TINY)
    shapes = text_shapes(config)
    for size in (1, 2):
        shards = shard_map(config, size)
        held = sum(
            math.prod(shards.of(name).part_shape(shape, rank, size))
            for rank in range(size)
            for name, shape in shapes.items()
        )
        parts = held_parts(shapes, shards, size, storage_of(None, 4))
        copies = sum(math.prod(shape) for name, shape in shapes.items() if shards.of(name).dim is None)
        assert held == sum(part.parameters for part in parts) + (size - 1) * copies
        assert sum(part.rank_bytes for part in parts) * size == held * 4


def test_ranks_beyond_the_kv_heads_hold_the_same_keys_and_values():
    config = config_of("qwen3.5-397b-a17b")
    shapes = text_shapes(config)
    two, eight = (cache_footprint(config, shapes, shard_map(config, size), size, 2) for size in (2, 8))
    assert two.token_bytes == eight.token_bytes == 15 * 2 * 256 * 2  # a key and a value head of 256, 15 layers
    assert (two.copies, eight.copies) == (1, 4)


def test_latents_are_the_same_on_every_rank():
    config = config_of("kimi-k2.5")
    cache = cache_footprint(config, text_shapes(config), shard_map(config, 8), 8, 2)
    assert cache.latent
    assert (cache.token_bytes, cache.copies) == (61 * (512 + 64) * 2, 8)


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("qwen3.5-397b-a17b", 15 * 2 * (256 + 2)),
        ("kimi-k2.5", 61 * (512 + 2 + 2 * 64)),
        ("gpt-oss-120b", 36 * 2 * (64 + 2)),
    ],
)
def test_fp8_keys_and_values_take_a_byte_an_element_and_two_a_scale(name, token_bytes):
    config = config_of(name)
    shards = shard_map(config, 8)
    assert cache_footprint(config, text_shapes(config), shards, 8, 2, "float8_e4m3").token_bytes == token_bytes
    as_bfloat16 = cache_footprint(config, text_shapes(config), shards, 8, 4, "bfloat16").token_bytes
    assert as_bfloat16 == cache_footprint(config, text_shapes(config), shards, 8, 2).token_bytes


def test_a_recurrent_state_of_the_397b_is_189_mb():
    config = config_of("qwen3.5-397b-a17b")
    cache = cache_footprint(config, text_shapes(config), shard_map(config, 8), 8, 2)
    memory = 45 * 64 * 128 * 128 * 4
    assert memory == 188_743_680
    assert cache.state_total_bytes == memory + 45 * (2 * 16 + 64) * 128 * 3 * 2
    assert cache.state_bytes == cache.state_total_bytes // 8


def test_fp8_halves_what_it_converts_and_nothing_else():
    plain_bytes, fp8 = (rank_bytes("qwen3.5-397b-a17b-fp8", 8, packed=packed) for packed in (False, True))
    assert fp8["experts"] == pytest.approx(plain_bytes["experts"] / 2, rel=1e-3)
    assert fp8["attention"] == pytest.approx(plain_bytes["attention"] / 2, rel=1e-2)
    assert all(fp8[part] == plain_bytes[part] for part in ("embedding", "head", "norms", "router"))


def test_kimis_experts_take_half_a_byte_and_their_scales():
    unpacked, packed = (rank_bytes("kimi-k2.5", 1, packed=packed) for packed in (False, True))
    assert packed["experts"] == 60 * 384 * 3 * 7168 * 2048 * (0.5 + 2 / 32)
    assert all(packed[part] == unpacked[part] for part in packed if part != "experts")
    assert sum(packed.values()) == pytest.approx(595e9, rel=0.01)  # the published files are 554 GiB with the tower


def test_gpt_oss_packs_its_experts_only():
    unpacked, packed = (rank_bytes("gpt-oss-120b", 1, packed=packed) for packed in (False, True))
    assert packed["experts"] == pytest.approx(unpacked["experts"] * 4.25 / 16, rel=1e-2)
    assert packed["attention"] == unpacked["attention"]


def test_more_tokens_touch_more_experts_but_never_more_than_there_are():
    experts = RoutedExperts(512, 10)
    touched = [experts.touched(tokens) for tokens in (1, 16, 4096)]
    assert touched[0] == pytest.approx(10)
    assert touched == sorted(touched)
    assert touched[-1] <= 512
