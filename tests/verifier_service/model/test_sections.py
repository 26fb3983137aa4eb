"""Attention in sections: torch's own numbers, and for a row the same bits whatever is computed beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from verifier_service.model.sections import SECTION, attend

CONTEXT = 3 * SECTION + 11
HEADS, KV_HEADS, DIM, WIDTH = 6, 2, 16, 24


@pytest.fixture(scope="module")
def drawn() -> dict[str, torch.Tensor]:
    """Queries of every position, and what they look at."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "query": (HEADS, CONTEXT, DIM),
        "keys": (CONTEXT, KV_HEADS, DIM),
        "values": (CONTEXT, KV_HEADS, WIDTH),
        "sinks": (HEADS,),
    }
    return {name: 2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def rows(drawn: dict[str, torch.Tensor], start: int, stop: int, window: int | None, sinks: bool) -> torch.Tensor:
    return attend(
        drawn["query"][:, start:stop],
        drawn["keys"][:stop],
        drawn["values"][:stop],
        start=start,
        scaling=0.3,
        window=window,
        sinks=drawn["sinks"] if sinks else None,
    )


def by_softmax(drawn: dict[str, torch.Tensor], window: int | None, sinks: bool) -> torch.Tensor:
    keys, values = (drawn[name].repeat_interleave(HEADS // KV_HEADS, dim=1) for name in ("keys", "values"))
    scores = torch.einsum("htd,chd->htc", drawn["query"], keys) * 0.3
    at = torch.arange(CONTEXT)
    hidden = at > at[:, None]
    if window is not None:
        hidden |= at <= at[:, None] - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks:
        scores = torch.cat([scores, drawn["sinks"][:, None, None].expand(-1, CONTEXT, 1)], dim=-1)
    return torch.einsum("htc,chw->thw", F.softmax(scores, dim=-1)[..., :CONTEXT], values)


@pytest.mark.parametrize("window", [None, 5, SECTION, SECTION + 30])
@pytest.mark.parametrize("sinks", [False, True])
def test_it_is_softmax_attention(drawn, window, sinks):
    assert torch.allclose(rows(drawn, 0, CONTEXT, window, sinks), by_softmax(drawn, window, sinks), atol=2e-5)


@pytest.mark.parametrize("window", [None, 5, SECTION + 30])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(drawn, window, sinks):
    whole = rows(drawn, 0, CONTEXT, window, sinks)
    for start, count in ((0, 1), (SECTION - 1, 1), (SECTION, 1), (CONTEXT - 1, 1), (SECTION - 3, 7), (60, 100)):
        assert torch.equal(rows(drawn, start, start + count, window, sinks), whole[start : start + count])


def test_a_heads_bits_do_not_depend_on_the_heads_beside_it(drawn):
    whole = rows(drawn, 0, CONTEXT, None, False)
    groups = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        own = slice(head * groups, (head + 1) * groups)
        part = {
            "query": drawn["query"][own],
            "keys": drawn["keys"][:, head : head + 1],
            "values": drawn["values"][:, head : head + 1],
        }
        assert torch.equal(rows(part, 0, CONTEXT, None, False), whole[:, own])


def test_what_lies_beyond_a_row_does_not_reach_it(drawn):
    whole = rows(drawn, 0, CONTEXT, None, False)
    changed = {**drawn, "keys": drawn["keys"].clone(), "values": drawn["values"].clone()}
    changed["keys"][100:] += 3
    changed["values"][100:] -= 3
    assert torch.equal(rows(changed, 0, CONTEXT, None, False)[:100], whole[:100])
