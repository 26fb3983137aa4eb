"""Normalise and store latents, rotate queries and keys: against the verifier's own layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kernels.latent_append import kernel, reference
from modeling.norms import FusedRMSNorm
from verifier_service.model.kv_storage import KvStorage
from verifier_service.model.latent_attention import LatentAttention, LatentShape

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
LATENT, ROTARY, HEADS, TOKENS = 24, 8, 3, 4


def a_step() -> tuple[Any, ...]:
    """compressed, norm weight, eps, query, cos, sin."""
    angles = torch.rand(TOKENS, ROTARY // 2).repeat(1, 2) * 7
    compressed, weight = torch.randn(TOKENS, LATENT + ROTARY), torch.rand(LATENT) + 0.5
    return compressed, weight, 1e-6, torch.randn(TOKENS, HEADS, ROTARY), angles.cos(), angles.sin()


def the_verifiers_own(interleaved: bool, compressed, weight, eps, query, cos, sin):
    """Rotated queries and what is written to the cache, [tokens, latent + rotary]."""
    shape = LatentShape(heads=HEADS, content=2, rotary=ROTARY, value=2, latent=LATENT)
    nothing, up = nn.Identity(), torch.zeros(HEADS * 4, LATENT)
    layer = LatentAttention(
        nothing, nothing, nothing, up, nothing, layer=0, shape=shape, scaling=1.0, interleaved=interleaved
    )
    latent, key = compressed.split([LATENT, ROTARY], dim=-1)
    turned = layer._rotate(torch.cat([query, key[:, None]], dim=1), cos[None], sin[None])
    normed = FusedRMSNorm(weight, eps, zero_centered=False)(latent)
    return turned[:, :-1], torch.cat([normed, turned[:, -1]], dim=-1)


@WAYS
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_cache_and_the_queries_are_the_verifiers_own(way: Any, interleaved: bool):
    step, rows = a_step(), torch.tensor([17, 3, 0, 8])
    want_query, written = the_verifiers_own(interleaved, *step)
    cache = torch.randn(5, 4, LATENT + ROTARY)
    want = cache.clone()
    want.view(20, -1)[rows] = written
    both = cache.split([LATENT, ROTARY], dim=-1)
    got = way.append_latents(*step, rows, *both, interleaved=interleaved)
    torch.testing.assert_close(got, want_query, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache, want, rtol=1e-5, atol=1e-6)


@WAYS
def test_queries_go_where_the_attention_reads_them(way: Any):
    step = a_step()
    queries = torch.zeros(TOKENS, HEADS, LATENT + ROTARY)
    caches = torch.zeros(2, 4, LATENT), torch.zeros(2, 4, ROTARY)
    rows = torch.arange(TOKENS, dtype=torch.int32)
    want = way.append_latents(*step, rows, *caches, interleaved=True)
    got = way.append_latents(*step, rows, *caches, interleaved=True, output=queries[..., LATENT:])
    assert got.data_ptr() == queries[..., LATENT:].data_ptr()
    assert torch.equal(queries[..., LATENT:], want)
    assert not queries[..., :LATENT].any()


@WAYS
def test_a_padding_token_is_not_stored(way: Any):
    caches = torch.randn(2, 4, LATENT), torch.randn(2, 4, ROTARY)
    before = [cache.clone() for cache in caches]
    rows = torch.tensor([-1, 5, -1, -1])
    way.append_latents(*a_step(), rows, *caches, interleaved=False)
    for cache, old in zip(caches, before):
        changed = (cache != old).any(-1).flatten().nonzero().flatten()
        assert changed.tolist() == [5]


@WAYS
def test_fp8_latents_are_what_the_verifiers_own_cache_holds(way: Any):
    compressed, weight, _, query, cos, sin = a_step()
    weight = torch.ones_like(weight)
    # Numbers that normalise to themselves and need no rounding: the interpreter loses the carry when it rounds to fp8.
    compressed[:, :LATENT] = torch.tensor([1.0, -1.0]).repeat(LATENT // 2)
    if way is reference:
        compressed[1, :LATENT], compressed[2, :LATENT] = torch.randn(2, LATENT).unbind()
    step, rows = (compressed, weight, 0.0, query, cos, sin), torch.tensor([7, 3, 0, 2])
    own: Any = KvStorage(2, 4, "float8_e4m3", torch.float32, "cpu").latents({0: (LATENT, ROTARY)})[0]
    plain = torch.zeros(2, 4, LATENT), torch.zeros(2, 4, ROTARY)
    reference.append_latents(*step, rows, *plain, interleaved=True)
    own.write(rows, torch.cat(plain, dim=-1).view(8, -1)[rows])
    codes = torch.zeros(2, 4, LATENT, dtype=torch.float8_e4m3fn)
    rotary, scales = torch.zeros(2, 4, ROTARY, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
    way.append_latents(*step, rows, codes, rotary, scales, interleaved=True)
    assert torch.equal(scales, own.latents.scales)
    assert torch.equal(codes.view(torch.uint8), own.latents.codes)
    torch.testing.assert_close(rotary, own.rotary.stored, rtol=2**-7, atol=1e-6)  # the interpreter cuts bfloat16 off


def test_a_token_does_not_depend_on_the_others():
    way: Any = kernel
    step, rows = a_step(), torch.arange(TOKENS)
    whole = torch.zeros(1, 4, LATENT), torch.zeros(1, 4, ROTARY)
    one = torch.zeros(1, 4, LATENT), torch.zeros(1, 4, ROTARY)
    together = way.append_latents(*step, rows, *whole, interleaved=True)
    compressed, weight, eps, query, cos, sin = step
    single: Any = compressed[2:3], weight, eps, query[2:3, 1:], cos[2:3], sin[2:3]
    alone = way.append_latents(*single, rows[2:3], *one, interleaved=True)
    assert torch.equal(alone, together[2:3, 1:])
    assert all(torch.equal(own[0, 2], every[0, 2]) for own, every in zip(one, whole))


@WAYS
def test_arguments_that_do_not_fit_are_named(way: Any):
    compressed, weight, eps, query, cos, sin = a_step()
    caches = torch.zeros(2, 4, LATENT), torch.zeros(2, 4, ROTARY)
    with pytest.raises(ValueError, match=r"query \(4, 3, 6\) must be \(4, 3, 8\)"):
        way.append_latents(
            *(compressed, weight, eps, query[..., :6], cos, sin, torch.arange(4), *caches), interleaved=True
        )
