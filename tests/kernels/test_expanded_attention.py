"""Expanded latent attention: the kernels against the references, and both against attention over whole contexts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.expanded_attention import kernel, reference
from kernels.expanded_attention.batch import ChunkBatch, empty_sums
from kernels.expanded_attention.kernel import Tiling
from tests.kernels.batches import BLOCK_TOKENS
from verifier_service.model.kv_storage import KvStorage

SMALL = Tiling(rows=16, tokens=16, warps=4, stages=1)
CONTENT, ROTARY, VALUE = 16, 8, 24


def a_chunk_batch(rows: list[int], contexts: list[int]) -> ChunkBatch:
    starts, bounds = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (rows, contexts))
    return ChunkBatch(starts, bounds)


def whole(rows: list[int], contexts: list[int], query: Any, expanded: Any, keys: Any) -> torch.Tensor:
    """torch's attention of each chunk over its whole context."""
    heads, output = expanded.shape[1], []
    places = torch.cat([expanded[..., :CONTENT], keys[:, None].expand(-1, heads, -1)], dim=-1)
    for own, seen, count, context in zip(
        query.split(rows), zip(places.split(contexts), expanded[..., CONTENT:].split(contexts)), rows, contexts
    ):
        key, value = (x.transpose(0, 1).float() for x in seen)
        mask = torch.arange(context) <= torch.arange(context - count, context)[:, None]
        made = F.scaled_dot_product_attention(own.transpose(0, 1).float(), key, value, mask, scale=0.3)
        output.append(made.transpose(0, 1))
    return torch.cat(output)


def agree(rows: list[int], contexts: list[int], section: int, heads: int = 2, dtype: Any = torch.float32) -> None:
    total, batch = sum(contexts), a_chunk_batch(rows, contexts)
    query = torch.randn(sum(rows), heads, CONTENT + ROTARY).to(dtype)
    expanded, keys = torch.randn(total, heads, CONTENT + VALUE).to(dtype), torch.randn(total, ROTARY).to(dtype)
    want = whole(rows, contexts, query, expanded, keys)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for way, options in ((reference, {}), (kernel, {"tile": SMALL})):
        output = torch.full((sum(rows), heads, VALUE), float("nan"), dtype=dtype)
        sums = None if section >= total else empty_sums(sum(rows), heads, VALUE, query.device)
        for first in range(0, total, section):
            part = slice(first, first + section)
            way.attend_section(
                *query.split([CONTENT, ROTARY], dim=-1),
                *(expanded[part], keys[part], batch, output, sums),
                **{"first": first, "scaling": 0.3, **options},
            )
        torch.testing.assert_close(output.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("section", [16, 48, 1000])
def test_ragged_chunks_see_their_own_contexts_whatever_the_sections(section: int):
    agree([5, 20, 3], [37, 20, 60], section)


def test_half_precision_queries_keep_their_sums_in_single_precision():
    agree([18], [70], 32, dtype=torch.float16)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), min_size=1, max_size=3),
    st.integers(1, 80),
)
def test_any_chunks_and_sections(chunks: list[tuple[int, int]], section: int):
    agree([rows for rows, _ in chunks], [rows + before for rows, before in chunks], max(section, 10), heads=1)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_section_is_what_the_cache_holds_for_its_places(fp8: bool):
    contexts, width, turning = [21, 1, 40], 24, 6
    bounds = torch.tensor([0, *contexts]).cumsum(0).int()
    tables = torch.randperm(9, dtype=torch.int32).view(3, 3)
    storage = KvStorage(9, BLOCK_TOKENS, "float8_e4m3" if fp8 else "auto", torch.float32, "cpu")
    cache: Any = storage.latents({0: (width, turning)})[0]
    stored = torch.randn(9 * BLOCK_TOKENS, width + turning) * 2.0 ** torch.randint(-4, 4, (9 * BLOCK_TOKENS, 1))
    cache.write(torch.arange(9 * BLOCK_TOKENS), stored)
    if fp8:
        given = cache.latents.codes.view(torch.float8_e4m3fn), cache.rotary.stored
        scales = cache.latents.scales
    else:
        given, scales = tuple(cache.latents.split([width, turning], dim=-1)), None
    want = torch.cat([cache.read(table)[:context] for table, context in zip(tables, contexts)])
    for first, stop in pairwise((0, 16, 50, 62)):
        for way in (reference, kernel):
            output = torch.empty(stop - first, width), torch.empty(stop - first, turning)
            way.copy_section(*given, tables, bounds, output, first=first, scales=scales)
            torch.testing.assert_close(torch.cat(output, dim=-1), want[first:stop])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.zeros(7, ROTARY)}, r"keys \(7, 8\) must be \[1, 1, rotary\] and \[8, rotary\]"),
        ({"expanded": torch.zeros(8, 1, CONTENT)}, r"expanded \(8, 1, 16\) must be \[section, 1, 16 \+ value\]"),
        ({"output": torch.zeros(1, 1, VALUE + 1)}, r"output \(1, 1, 25\) must be \[1, 1, 24\]"),
        ({"sums": empty_sums(2, 1, VALUE, torch.device("cpu"))}, r"sums of \(2, 1, 24\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str):
    arguments: dict[str, Any] = {
        "content": torch.zeros(1, 1, CONTENT),
        "rotary": torch.zeros(1, 1, ROTARY),
        "expanded": torch.zeros(8, 1, CONTENT + VALUE),
        "keys": torch.zeros(8, ROTARY),
        "batch": a_chunk_batch([1], [8]),
        "output": torch.zeros(1, 1, VALUE),
        "sums": None,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        kernel.attend_section(**arguments, first=0, scaling=1.0)
