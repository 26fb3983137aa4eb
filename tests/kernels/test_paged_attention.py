"""The paged attention kernel against the reference, and the reference against torch's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl

from kernels import ragged_tiles
from kernels.paged_attention import reference
from kernels.paged_attention.kernel import Tiling, paged_attention, parts
from kernels.paged_batch import PagedBatch
from kernels.ragged_tiles import sections
from tests.kernels.batches import BLOCK_TOKENS, a_batch, alone
from verifier_service.model.kv_storage import KvStorage

SMALL = Tiling(rows=16, tokens=16, warps=4, stages=2)


def tensors(batch: PagedBatch, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Any:
    blocks = int(batch.block_tables.max()) + 3
    query = torch.randn(int(batch.query_starts[-1]), heads, dim).to(dtype)
    keys, values = torch.randn(2, blocks, BLOCK_TOKENS, kv_heads, dim).to(dtype).unbind()
    return query, keys, values


def agree(heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32, **options: Any):
    batch = a_batch([3, 11, 1, 5], [35, 40, 1, 5])  # verify rows on a context, a prefill chunk, a first token, a prompt
    query, keys, values = tensors(batch, heads, kv_heads, dim, dtype)
    got = paged_attention(query, keys, values, batch, scaling=dim**-0.5, tile=SMALL, **options)
    options.pop("spread", None)
    want = reference.paged_attention(query, keys, values, batch, scaling=dim**-0.5, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_reference_is_torch_attention_of_each_request():
    batch = a_batch([4], [30])
    query, keys, values = tensors(batch, heads=4, kv_heads=2, dim=16)
    rows = (batch.block_tables[0].long()[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)).flatten()[:30]
    mask = torch.arange(30) <= torch.arange(26, 30)[:, None]
    want = F.scaled_dot_product_attention(
        query.transpose(0, 1),
        keys.flatten(0, 1)[rows].transpose(0, 1),
        values.flatten(0, 1)[rows].transpose(0, 1),
        mask,
        scale=0.3,
        enable_gqa=True,
    ).transpose(0, 1)
    got = reference.paged_attention(query, keys, values, batch, scaling=0.3)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [64, 128, 192, 256, 24])
def test_ragged_verify_rows_and_prefill_chunks_agree_with_the_reference(dim: int):
    agree(heads=2, kv_heads=1, dim=dim)


@pytest.mark.parametrize("split_tokens", [None, 16])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(48, 32), (32, 80)])
def test_values_may_be_of_another_width_than_keys(key_dim: int, value_dim: int, split_tokens: int | None):
    """48 is read as 32 + 16, 80 as 64 + 16."""
    batch = a_batch([3, 5], [20, 33])
    query, keys, _ = tensors(batch, heads=4, kv_heads=2, dim=key_dim)
    options: dict[str, Any] = {"scaling": 0.2, "split_tokens": split_tokens, "sinks": torch.randn(4)}
    values = torch.randn(*keys.shape[:3], value_dim)
    got = paged_attention(query, keys, values, batch, tile=SMALL, **options)
    want = reference.paged_attention(query, keys, values, batch, **options)
    assert got.shape == (8, 4, value_dim)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_width_is_read_in_one_power_of_two_or_in_two_smaller_ones():
    for width in range(1, 300):
        first, rest = parts(width)
        assert width <= first + rest <= max(16, 2 * width - 1)
        assert all(size == 0 or (size >= 16 and size & (size - 1) == 0) for size in (first, rest))
        assert rest == 0 or first < width


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (16, 1)])
def test_any_number_of_heads_may_share_a_kv_head(heads: int, kv_heads: int):
    agree(heads, kv_heads, dim=16)


def test_the_tiling_of_the_model_serves_a_group_of_32():
    batch = a_batch([2], [20])
    query, keys, values = tensors(batch, heads=32, kv_heads=1, dim=16)
    got = paged_attention(query, keys, values, batch, scaling=0.25)
    want = reference.paged_attention(query, keys, values, batch, scaling=0.25)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_half_precision_agrees_within_its_rounding():
    agree(heads=4, kv_heads=2, dim=64, dtype=torch.float16)


@pytest.mark.parametrize("window", [1, 5, 17, 1000])
def test_a_row_sees_only_its_window(window: int):
    agree(heads=2, kv_heads=1, dim=16, sliding_window=window)


@pytest.mark.parametrize("split_tokens", [None, 16])
def test_sinks_take_their_share_of_the_softmax(split_tokens: int | None):
    agree(heads=4, kv_heads=2, dim=16, sinks=torch.randn(4) + 2, split_tokens=split_tokens)


def test_scores_are_capped_softly():
    agree(heads=2, kv_heads=1, dim=16, soft_cap=0.5)


@pytest.mark.parametrize("window", [None, 9])
def test_sections_add_up_to_the_whole(window: int | None):
    agree(heads=4, kv_heads=2, dim=16, split_tokens=16, sliding_window=window)


@pytest.mark.parametrize("split_tokens", [None, 16])
def test_fp8_keys_and_values_are_worth_their_scales(split_tokens: int | None):
    batch = a_batch([3, 5], [20, 33])
    query, keys, values = tensors(batch, heads=4, kv_heads=2, dim=16)
    keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    key_scales, value_scales = (2.0 ** torch.randint(-3, 3, keys.shape[:3]) for _ in range(2))
    plain_keys, plain_values = keys.float() * key_scales[..., None], values.float() * value_scales[..., None]
    want = reference.paged_attention(query, plain_keys, plain_values, batch, scaling=0.25)
    scales: dict[str, Any] = {"key_scales": key_scales.bfloat16(), "value_scales": value_scales.bfloat16()}
    torch.testing.assert_close(reference.paged_attention(query, keys, values, batch, scaling=0.25, **scales), want)
    got = paged_attention(query, keys, values, batch, scaling=0.25, tile=SMALL, split_tokens=split_tokens, **scales)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_verifiers_fp8_cache_is_read_as_it_lies():
    batch = a_batch([3], [20])
    query, keys, values = tensors(batch, heads=4, kv_heads=2, dim=16)
    cache: Any = KvStorage(len(keys), BLOCK_TOKENS, "float8_e4m3", torch.float32, "cpu").layers({0: (2, 16)})[0]
    cache.write(torch.arange(len(keys) * BLOCK_TOKENS), keys.flatten(0, 1), values.flatten(0, 1))
    read_keys, read_values = (x.view(keys.shape) for x in cache.read(torch.arange(len(keys))))
    want = reference.paged_attention(query, read_keys, read_values, batch, scaling=0.25)
    keys, values = (part.codes.view(torch.float8_e4m3fn) for part in (cache.keys, cache.values))
    scales: dict[str, Any] = {"key_scales": cache.keys.scales, "value_scales": cache.values.scales}
    got = paged_attention(query, keys, values, batch, scaling=0.25, tile=SMALL, **scales)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_result_does_not_depend_on_the_other_requests_or_the_number_of_rows():
    """Bit by bit: the promise of deterministic mode."""
    batch = a_batch([3, 9, 2], [40, 50, 33])
    query, keys, values = tensors(batch, heads=4, kv_heads=2, dim=16)
    options: dict[str, Any] = {"scaling": 0.25, "split_tokens": 16, "tile": SMALL}
    together = paged_attention(query, keys, values, batch, **options)
    for request, (first, rows, context) in enumerate([(0, 3, 40), (3, 9, 50), (12, 2, 33)]):
        for kept in {1, rows}:  # the request alone, with all of its rows and with its first row only
            own = alone(batch, request, kept, context - rows + kept)
            got = paged_attention(query[first : first + kept], keys, values, own, **options)
            assert torch.equal(got, together[first : first + kept])


def test_a_rank_with_some_heads_of_a_kv_head_gets_the_same_bits():
    batch = a_batch([2], [40])
    query, keys, values = tensors(batch, heads=8, kv_heads=1, dim=16)
    whole = paged_attention(query, keys, values, batch, scaling=0.25)
    for heads in (slice(0, 1), slice(2, 6)):
        assert torch.equal(paged_attention(query[:, heads], keys, values, batch, scaling=0.25), whole[:, heads])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums over what happens to lie in the padding
def test_padding_rows_and_a_loose_bound_change_nothing():
    """A captured graph launches with the bucket's rows and the longest context it may ever see."""
    batch = a_batch([3, 2], [20, 30])
    query, keys, values = tensors(batch, heads=2, kv_heads=1, dim=16)
    loose = PagedBatch(batch.block_tables, batch.query_starts, batch.context_lengths, longest_context=80)
    padded = torch.cat([query, query.new_full((4, 2, 16), 1.0)])
    options: dict[str, Any] = {"scaling": 0.25, "split_tokens": 16, "tile": SMALL}
    got = paged_attention(padded, keys, values, loose, **options)
    assert torch.equal(got[:5], paged_attention(query, keys, values, batch, **options))


def test_queries_and_caches_may_be_strided_views():
    batch = a_batch([3], [20])
    query, keys, values = tensors(batch, heads=2, kv_heads=2, dim=16)
    both = torch.stack([keys, values], dim=2)  # as a pool that keeps keys beside values
    flipped = query.transpose(0, 1).contiguous().transpose(0, 1)
    got = paged_attention(flipped, both[:, :, 0], both[:, :, 1], batch, scaling=0.25, tile=SMALL)
    torch.testing.assert_close(got, reference.paged_attention(query, keys, values, batch, scaling=0.25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sinks": torch.zeros(3)}, r"sinks \(3,\) must be \[2\]"),
        ({"key_scales": torch.ones(5, 16, 1)}, "key_scales and value_scales go together"),
        ({"key_scales": torch.ones(1), "value_scales": torch.ones(1)}, r"key_scales \(1,\) must be \("),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"split_tokens": 24}, "split_tokens is 24: want a multiple of the tile's 16"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str):
    batch = a_batch([1], [2])
    query, keys, values = tensors(batch, heads=2, kv_heads=1, dim=16)
    with pytest.raises(ValueError, match=message):
        paged_attention(query, keys, values, batch, scaling=1.0, tile=SMALL, **change)


def test_contexts_spread_over_the_device_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch):
    """Of up to 40 tokens, in parts of one tile and more; padding behind the rows and a loose bound change nothing."""
    monkeypatch.setattr(ragged_tiles, "LEAST_TILES", tl.constexpr(1))
    monkeypatch.setattr(ragged_tiles, "MULTIPROCESSORS", 12)
    agree(heads=4, kv_heads=2, dim=16, spread=True, sinks=torch.randn(4) + 2)
    batch = a_batch([2, 1], [40, 3])
    query, keys, values = tensors(batch, heads=2, kv_heads=1, dim=16)
    want = reference.paged_attention(query, keys, values, batch, scaling=0.25)
    loose = PagedBatch(batch.block_tables, batch.query_starts, batch.context_lengths, longest_context=9999)
    padded = torch.cat([query, query.new_full((4, *query.shape[1:]), 1.0)])
    got = paged_attention(padded, keys, values, loose, scaling=0.25, spread=True, tile=SMALL)
    torch.testing.assert_close(got[:3], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("programs", "context", "parts_of_each"),
    [
        (8, 32_768, 33),  # one request, 8 KV heads
        (8, 2048, 8),  # in parts of 256 tokens at least
        (8, 60, 1),
        (128, 32_768, 2),
        (256, 32_768, 0),
        (1024, 32_768, 0),
    ],
)
def test_contexts_are_cut_into_as_many_parts_as_fill_the_device(programs: int, context: int, parts_of_each: int):
    """Tiles of 64 tokens, two programs on each of 132 multiprocessors."""
    batch = PagedBatch(torch.empty(1, 1), torch.empty(2), torch.empty(1), context)
    assert sections(batch, programs, 64, None, spread=2) == parts_of_each
    assert sections(batch, programs, 64, None, spread=0) == 0
    assert sections(batch, programs, 64, 4096, spread=2) == max(1, context // 4096), "fixed multiples come first"
