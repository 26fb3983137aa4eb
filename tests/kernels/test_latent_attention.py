"""Latent attention: the kernel against the reference, and the reference against expanded keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ragged_tiles
from kernels.latent_attention import reference
from kernels.latent_attention.kernel import Tiling, latent_attention
from kernels.paged_batch import PagedBatch
from tests.kernels.batches import BLOCK_TOKENS, a_batch, alone
from verifier_service.model.kv_storage import KvStorage

SMALL = Tiling(rows=16, tokens=16, warps=4, stages=2)
LATENT, ROTARY = 32, 16


def tensors(batch: PagedBatch, heads: int, widths=(LATENT, ROTARY), dtype=torch.float32) -> Any:
    """Queries, and latents and rotary keys as two views of one cache."""
    query = torch.randn(int(batch.query_starts[-1]), heads, sum(widths)).to(dtype)
    cache = torch.randn(int(batch.block_tables.max()) + 3, BLOCK_TOKENS, sum(widths)).to(dtype)
    return query, *cache.split(widths, dim=-1)


def agree(batch: PagedBatch, heads: int, widths=(LATENT, ROTARY), dtype=torch.float32, **options: Any) -> None:
    query, latents, rotary = tensors(batch, heads, widths, dtype)
    got = latent_attention(query, latents, rotary, batch, scaling=0.2, tile=SMALL, **options)
    want = reference.latent_attention(query, latents, rotary, batch, scaling=0.2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_reference_is_attention_over_expanded_keys_and_values():
    """A head's keys are [U c, r] and its values V c; a query is absorbed by U, what it saw is mapped by V."""
    batch = a_batch([3], [20])
    _, latents, rotary = tensors(batch, heads=2)
    content, turned = torch.randn(2, 3, 8), torch.randn(2, 3, ROTARY)
    key_up, value_up = torch.randn(2, 8, LATENT), torch.randn(2, LATENT, 5)
    blocks = batch.block_tables[0].long()
    seen, key = (x[blocks].flatten(0, 1)[:20].expand(2, -1, -1) for x in (latents, rotary))
    keys, values = torch.cat([seen @ key_up.mT, key], dim=-1), seen @ value_up
    mask = torch.arange(20) <= torch.arange(17, 20)[:, None]
    want = F.scaled_dot_product_attention(torch.cat([content, turned], dim=-1), keys, values, mask, scale=0.2)
    query = torch.cat([content @ key_up, turned], dim=-1).transpose(0, 1)
    got = reference.latent_attention(query, latents, rotary, batch, scaling=0.2)
    torch.testing.assert_close(got.transpose(0, 1) @ value_up, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3, 16, 20])
def test_any_number_of_heads_is_packed_beside_ragged_rows(heads: int):
    """20 heads take two tiles of 16 score rows."""
    agree(a_batch([3, 1, 5], [35, 1, 5]), heads)


def test_contexts_spread_over_the_device_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ragged_tiles, "LEAST_TILES", tl.constexpr(1))
    monkeypatch.setattr(ragged_tiles, "MULTIPROCESSORS", 12)
    agree(a_batch([3, 1, 5], [35, 1, 5]), heads=3, spread=True)


@pytest.mark.parametrize("split_tokens", [None, 16])
def test_widths_need_not_be_powers_of_two(split_tokens: int | None):
    agree(a_batch([2, 4], [33, 20]), heads=2, widths=(24, 6), split_tokens=split_tokens)


def test_half_precision_agrees_within_its_rounding():
    agree(a_batch([2, 5], [33, 5]), heads=2, dtype=torch.float16)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=3),
    st.sampled_from([None, 16, 32]),
)
def test_any_ragged_batch_agrees_with_the_reference(requests: list[tuple[int, int]], split_tokens: int | None):
    """Requests without rows among them, as in a captured graph's bucket."""
    rows = [rows for rows, _ in requests]
    if any(rows):
        agree(a_batch(rows, [max(1, count + before) for count, before in requests]), heads=2, split_tokens=split_tokens)


@pytest.mark.parametrize("split_tokens", [None, 16])
def test_the_verifiers_fp8_latents_are_read_as_they_lie(split_tokens: int | None):
    batch = a_batch([3, 2], [20, 33])
    query, latents, rotary = tensors(batch, heads=3)
    storage = KvStorage(len(latents), BLOCK_TOKENS, "float8_e4m3", torch.float32, "cpu")
    cache: Any = storage.latents({0: (LATENT, ROTARY)})[0]
    unequal = latents * 2.0 ** torch.randint(-6, 6, latents.shape[:2])[..., None]
    cache.write(torch.arange(len(latents) * BLOCK_TOKENS), torch.cat([unequal, rotary], dim=-1).flatten(0, 1))
    wide, plain = cache.read(torch.arange(len(latents))).view(*latents.shape[:2], -1).split([LATENT, ROTARY], dim=-1)
    want = reference.latent_attention(query, wide, plain, batch, scaling=0.2)
    codes, keys = cache.latents.codes.view(torch.float8_e4m3fn), cache.rotary.stored
    options: dict[str, Any] = {"scaling": 0.2, "scales": cache.latents.scales, "split_tokens": split_tokens}
    torch.testing.assert_close(reference.latent_attention(query, codes, keys, batch, **options), want)
    got = latent_attention(query, codes, keys, batch, tile=SMALL, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split_tokens", [None, 16])
def test_a_result_does_not_depend_on_the_other_requests_the_rows_or_the_ranks_heads(split_tokens: int | None):
    """Bit by bit: the promise of deterministic mode."""
    batch = a_batch([3, 5], [40, 33])
    query, latents, rotary = tensors(batch, heads=4)
    options: dict[str, Any] = {"scaling": 0.2, "split_tokens": split_tokens, "tile": SMALL}
    together = latent_attention(query, latents, rotary, batch, **options)
    for request, (first, rows, context) in enumerate([(0, 3, 40), (3, 5, 33)]):
        for kept in (1, rows):  # the request alone, with all of its rows and with its first row only
            own = alone(batch, request, kept, context - rows + kept)
            for heads in (slice(0, 4), slice(1, 3)):
                got = latent_attention(query[first : first + kept, heads], latents, rotary, own, **options)
                assert torch.equal(got, together[first : first + kept, heads])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums over what happens to lie in the padding
def test_padding_rows_and_a_loose_bound_change_nothing():
    batch = a_batch([3, 2], [20, 30])
    query, latents, rotary = tensors(batch, heads=2)
    loose = PagedBatch(batch.block_tables, batch.query_starts, batch.context_lengths, longest_context=80)
    padded = torch.cat([query, query.new_full((4, *query.shape[1:]), 1.0)])
    options: dict[str, Any] = {"scaling": 0.2, "split_tokens": 16, "tile": SMALL}
    got = latent_attention(padded, latents, rotary, loose, **options)
    assert torch.equal(got[:5], latent_attention(query, latents, rotary, batch, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.ones(1)}, r"scales \(1,\) must be \("),
        ({"split_tokens": 0}, "split_tokens is 0"),
        ({"split_tokens": 24}, "split_tokens is 24: want a multiple of the tile's 16"),
        ({"query": torch.zeros(1, 1, 40)}, r"the last being 32 \+ 16"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str):
    batch = a_batch([1], [2])
    query, latents, rotary = tensors(batch, heads=1)
    arguments: dict[str, Any] = {"query": query, "latents": latents, "rotary": rotary, "batch": batch, **change}
    with pytest.raises(ValueError, match=message):
        latent_attention(**arguments, scaling=1.0, tile=SMALL)
