"""Context and block KV: norm, rotation and the write into the drafter's pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from kernels.context_inject import kernel, reference
from kernels.context_inject.reference import Rotation

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
LAYERS, ROWS, KV_HEADS, DIM, EPS = 2, 9, 3, 12, 1e-6


def rotation(scale: float = 1.0) -> Rotation:
    return Rotation(100.0 ** (-torch.arange(0, DIM, 2).float() / DIM), scale)


def an_inject(tokens: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    width = LAYERS * 2 * KV_HEADS * DIM
    return {
        "projected": torch.randn(tokens, width).to(dtype),
        "key_norms": torch.rand(LAYERS, DIM).to(dtype) + 0.5,
        "positions": torch.tensor([70_001, 5, 0, 12])[:tokens],
        "rows": torch.tensor([3, 8, 0, 5])[:tokens],
        "rotation": rotation(),
        "eps": EPS,
        "pool": torch.randn(LAYERS, ROWS, 2, KV_HEADS, DIM).to(dtype),
        "pool_positions": torch.full((ROWS,), -7),
    }


def injected(way: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pool before and after, and its positions."""
    torch.manual_seed(1)
    given = an_inject() | changes
    before = given["pool"].clone()
    way.inject_context(**given)
    return before, given["pool"], given["pool_positions"]


@WAYS
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_all_layers_keys_are_normed_and_turned_as_transformers_does(way: Any, scale: float):
    torch.manual_seed(1)
    given = an_inject()
    before, pool, positions = injected(way, rotation=rotation(scale))
    made = given["projected"].view(4, LAYERS, 2, KV_HEADS, DIM)
    angles = (given["positions"][:, None] * given["rotation"].frequencies).repeat(1, 2)
    for layer in range(LAYERS):
        normed = torch.nn.functional.rms_norm(made[:, layer, 0], (DIM,), given["key_norms"][layer], EPS)
        heads = normed.transpose(0, 1)[None]
        turned = apply_rotary_pos_emb(heads, heads, angles.cos()[None] * scale, angles.sin()[None] * scale)[0][0]
        want = before[layer].clone()
        want[given["rows"]] = torch.stack([turned.transpose(0, 1), made[:, layer, 1]], dim=1)
        torch.testing.assert_close(pool[layer], want, rtol=1e-4, atol=1e-4)
    assert positions.tolist() == [0, -7, -7, 70_001, -7, 12, -7, -7, 5]


@WAYS
def test_a_padding_row_is_written_nowhere(way: Any):
    before, pool, positions = injected(way, rows=torch.tensor([-1, 8, -1, -1]))
    changed = (before != pool).flatten(2).any(-1)
    assert changed.any(0).tolist() == [False] * 8 + [True]
    assert positions.tolist() == [-7] * 8 + [5]


@WAYS
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_leaves_zeros(way: Any):
    projected = an_inject()["projected"]
    projected[1], projected[2, ::2] = float("nan"), float("inf")
    _, pool, _ = injected(way, projected=projected)
    assert pool.isfinite().all()
    assert not pool[:, 8].any()  # the row of the token that was nan throughout


def test_half_precision_agrees_with_the_reference():
    torch.manual_seed(2)
    given = an_inject(dtype=torch.float16)
    pools = given["pool"], given["pool"].clone()
    for way, pool in zip((kernel, reference), pools):
        way.inject_context(**(given | {"pool": pool}))
    torch.testing.assert_close(*pools, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 3, 12), (4, 1, 8), (2, 2, 16)])
def test_a_blocks_heads_agree_with_the_reference(heads: int, kv_heads: int, dim: int):
    qkv = torch.randn(5, heads + 2 * kv_heads, dim)
    norms = torch.rand(2, dim) + 0.5
    positions, rows = torch.tensor([9, 10, 3, 4, 0]), torch.tensor([1, 2, 6, 7, -1])
    pool = torch.randn(ROWS, 2, kv_heads, dim)
    pools = pool.clone(), pool.clone()
    turn = Rotation(50.0 ** (-torch.arange(0, dim, 2).float() / dim))
    got, want = (
        way.inject_block(qkv, norms[0], norms[1], positions, rows, turn, EPS, own)
        for way, own in zip((kernel, reference), pools)
    )
    torch.testing.assert_close(got[:4], want[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*pools, rtol=1e-4, atol=1e-5)
    assert torch.equal(pools[0][[0, 3, 4, 5, 8]], pool[[0, 3, 4, 5, 8]])


@WAYS
def test_shapes_that_do_not_fit_are_named(way: Any):
    with pytest.raises(ValueError, match=r"projected \(4, 10\) must be \[tokens, 144\]"):
        injected(way, projected=torch.zeros(4, 10))
    with pytest.raises(ValueError, match=r"pool \(9, 2, 3, 12\) must be \[layers"):
        injected(way, pool=torch.zeros(ROWS, 2, KV_HEADS, DIM))
    with pytest.raises(ValueError, match=r"qkv \(2, 6, 12\) must be \[tokens, heads \+ 2 \* 3, 12\]"):
        way.inject_block(
            torch.zeros(2, 6, DIM), torch.ones(DIM), torch.ones(DIM), torch.zeros(2), torch.zeros(2), rotation(), EPS,
            torch.zeros(ROWS, 2, KV_HEADS, DIM),
        )  # fmt: skip
