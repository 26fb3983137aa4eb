"""Rotate queries and keys, append keys and values to the paged cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from kernels.kv_append import kernel, reference
from verifier_service.model.kv_storage import KvStorage

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


def a_step(rotary: int, tokens: int = 4, head_dim: int = 24):
    query, key, value = (
        torch.randn(tokens, 3, head_dim),
        torch.randn(tokens, 2, head_dim),
        torch.randn(tokens, 2, head_dim),
    )
    angles = torch.rand(tokens, rotary // 2).repeat(1, 2) * 7
    caches = torch.randn(2, 5, 4, 2, head_dim)
    return query, key, value, angles.cos(), angles.sin(), caches[0], caches[1]


@WAYS
def test_it_rotates_as_transformers_does_and_writes_the_named_rows(way):
    query, key, value, cos, sin, keys, values = a_step(rotary=24)
    rows = torch.tensor([17, 3, 0, 8])
    want_query, want_key = apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos[None], sin[None]
    )
    want_keys, want_values = keys.clone().view(20, 2, 24), values.clone().view(20, 2, 24)
    want_keys[rows], want_values[rows] = want_key[0].transpose(0, 1), value
    got = way.rotate_and_append(query, key, value, cos, sin, rows, keys, values)
    torch.testing.assert_close(got, want_query[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(keys.view(20, 2, 24), want_keys, rtol=1e-5, atol=1e-6)
    assert torch.equal(values.view(20, 2, 24), want_values)


@WAYS
def test_dimensions_past_the_rotary_ones_do_not_turn(way):
    query, key, value, cos, sin, keys, values = a_step(rotary=8)
    got = way.rotate_and_append(query, key, value, cos, sin, torch.arange(4), keys, values)
    assert torch.equal(got[..., 8:], query[..., 8:])
    assert torch.equal(keys[0, ..., 8:], key[..., 8:])
    assert not torch.equal(got[..., :8], query[..., :8])


@WAYS
@pytest.mark.parametrize("rotary", [24, 8])
def test_heads_are_normed_before_they_turn(way, rotary):
    query, key, value, cos, sin, keys, values = a_step(rotary)
    weights, rows, plain = torch.rand(2, 24) + 0.5, torch.tensor([17, 3, 0, 8]), (keys.clone(), values.clone())
    normed = [torch.nn.functional.rms_norm(x, (24,), weight, 1e-2) for x, weight in zip((query, key), weights)]
    want = reference.rotate_and_append(*(*normed, value, cos, sin, rows, *plain))
    norms = {"query_norm": weights[0], "key_norm": weights[1], "norm_eps": 1e-2}
    got = way.rotate_and_append(query, key, value, cos, sin, rows, keys, values, **norms)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(keys, plain[0], rtol=1e-5, atol=1e-6)


@WAYS
def test_a_padding_token_is_not_stored(way):
    query, key, value, cos, sin, keys, values = a_step(rotary=8)
    before = keys.clone(), values.clone()
    way.rotate_and_append(query, key, value, cos, sin, torch.full((4,), -1, dtype=torch.int32), keys, values)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


@WAYS
def test_an_fp8_cache_gets_what_the_verifiers_own_cache_holds(way):
    query, key, value, cos, sin, keys, values = a_step(rotary=24)
    value = value * torch.tensor([1.0, 300.0, 1e-6, 0.0])[:, None, None]
    if way is kernel:  # numbers that need no rounding: Triton's interpreter loses the carry when it rounds to fp8
        key, value = (x.clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.125 for x in (key, value))
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    rows = torch.tensor([17, 3, 0, 8])
    own: Any = KvStorage(5, 4, "float8_e4m3", torch.float32, "cpu").layers({0: (2, 24)})[0]
    plain = keys.clone(), values.clone()
    reference.rotate_and_append(query, key, value, cos, sin, rows, *plain)
    own.write(rows, plain[0].view(20, 2, 24)[rows], value)
    codes = [torch.zeros(keys.shape, dtype=torch.float8_e4m3fn) for _ in range(2)]
    scales = [torch.zeros(keys.shape[:3], dtype=torch.bfloat16) for _ in range(2)]
    way.rotate_and_append(query, key, value, cos, sin, rows, *codes, *scales)
    for got, got_scales, want in zip(codes, scales, (own.keys, own.values)):
        assert torch.equal(got_scales, want.scales)
        assert torch.equal(got.view(torch.uint8), want.codes)


def test_projections_and_caches_may_be_views_of_larger_tensors():
    query, key, value, cos, sin, keys, values = a_step(rotary=24)
    qkv, both = torch.cat([query, key, value], dim=1), torch.stack([keys, values], dim=2)
    rows = torch.tensor([5, 6, 7, 8])
    caches = both[:, :, 0], both[:, :, 1]
    got = kernel.rotate_and_append(qkv[:, :3], qkv[:, 3:5], qkv[:, 5:], cos, sin, rows, *caches)
    want = reference.rotate_and_append(query, key, value, cos, sin, rows, keys, values)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(both, torch.stack([keys, values], dim=2))


@WAYS
def test_caches_that_do_not_fit_are_named(way):
    query, key, value, cos, sin, keys, values = a_step(rotary=24)
    with pytest.raises(ValueError, match="key_cache"):
        way.rotate_and_append(query, key, value, cos, sin, torch.arange(4), keys[..., :8], values)
