"""The draft model, as trained and as served, against a slow reading of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drafter_service.attention import AttendEach, AttendPadded, Block
from drafter_service.context import ContextTable
from drafter_service.fused import FusedDFlash
from drafter_service.model import PADDING, DFlashModel, block_masks
from drafter_service.pool import ContextPool
from modeling.dflash import DFlashConfig, DraftCheckpointError, read_weights
from tests.drafter_service import paper
from tests.drafter_service.pairs import (
    BLOCK,
    FULL,
    HIDDEN,
    SLIDING,
    draft_config,
    second,
    write_checkpoint,
    write_drafter,
)
from tests.drafter_service.test_context import placed

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding": {"layer_types": [SLIDING, SLIDING], "sliding_window": 5},
    "mixed": {"layer_types": [SLIDING, FULL], "sliding_window": 7},
    "full, causal": {"is_causal": True},
    "sliding, not causal": {"layer_types": [SLIDING, SLIDING], "sliding_window": 4, "is_causal": False},
    "all heads alike, with biases": {"num_key_value_heads": 4, "attention_bias": True},
    "DFlash 2": second(),
    "DFlash 2, wider, mixed": {"layer_types": [SLIDING, FULL], "sliding_window": 7, **second(conv_kernel_size=3)},
}


@pytest.fixture(params=KINDS)
def drafter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_drafter(tmp_path / "drafter", **KINDS[request.param])


def expected(drafter: Path, features: torch.Tensor, first: int, embeddings: torch.Tensor, base: int) -> torch.Tensor:
    model = DFlashModel.load(drafter, torch.float32)
    return paper.block_hidden(
        model.dflash.raw, read_weights(drafter), features[: base - first], first, embeddings, base
    ).float()


def served(drafter: Path, attend: Any, blocks: list[tuple[int, torch.Tensor, torch.Tensor, int]], window: int = 32):
    """Hidden states per block of (first position, features, embeddings, base), all in one batch."""
    model = FusedDFlash(DFlashModel.load(drafter, torch.float32))
    table, pool = ContextTable(len(blocks), window), ContextPool(model, len(blocks), window)
    where = []
    with torch.inference_mode():
        for i, (first, features, embeddings, base) in enumerate(blocks):
            placement = placed(table, ("link", str(i)), first, len(features))
            pool.stage(placement, features)
            context, stale = placement.context, first + len(features) > base
            where.append(Block(pool.first_row(context), table.held(context), base, len(embeddings), stale))
        pool.flush()
        positions = torch.cat([torch.arange(base, base + len(rows)) for _, _, rows, base in blocks])
        embedded = torch.cat([embeddings for _, _, embeddings, _ in blocks])
        places = torch.cat([torch.arange(len(rows)) for _, _, rows, _ in blocks])
        hidden = model.forward(embedded, positions, attend(model, pool, where, positions), places)
        return model.final_norm(hidden).split([len(rows) for _, _, rows, _ in blocks])


def test_the_trained_form_equals_the_paper(drafter: Path) -> None:
    torch.manual_seed(1)
    features, embeddings = torch.randn(11, HIDDEN), torch.randn(BLOCK, HIDDEN)
    model = DFlashModel.load(drafter, torch.float32)
    positions, bases = torch.arange(11, 11 + BLOCK)[None], torch.full((1, BLOCK), 11)
    context_positions = torch.arange(11)[None]
    hidden = model(
        embeddings[None],
        positions,
        model.context_kv(features[None], context_positions),
        block_masks(model.dflash, positions, bases, context_positions),
        positions - bases,
    )
    torch.testing.assert_close(hidden[0], expected(drafter, features, 0, embeddings, 11), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attend", [AttendEach, AttendPadded])
def test_the_served_form_equals_the_paper_block_by_block(drafter: Path, attend: Any) -> None:
    torch.manual_seed(2)
    blocks = [
        (0, torch.randn(9, HIDDEN), torch.randn(BLOCK, HIDDEN), 9),
        (4, torch.randn(13, HIDDEN), torch.randn(3, HIDDEN), 17),
        (0, torch.randn(2, HIDDEN), torch.randn(2, HIDDEN), 2),
    ]
    for hidden, (first, features, embeddings, base) in zip(served(drafter, attend, blocks), blocks):
        torch.testing.assert_close(hidden, expected(drafter, features, first, embeddings, base), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attend", [AttendEach, AttendPadded])
def test_a_block_behind_its_context_does_not_see_what_came_after_its_base(drafter: Path, attend: Any) -> None:
    torch.manual_seed(3)
    features, embeddings = torch.randn(14, HIDDEN), torch.randn(BLOCK, HIDDEN)
    (hidden,) = served(drafter, attend, [(0, features, embeddings, 10)])
    torch.testing.assert_close(hidden, expected(drafter, features, 0, embeddings, 10), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attend", [AttendEach, AttendPadded])
def test_a_context_longer_than_the_window_is_its_last_rows(drafter: Path, attend: Any) -> None:
    torch.manual_seed(4)
    features, embeddings = torch.randn(21, HIDDEN), torch.randn(BLOCK, HIDDEN)
    (hidden,) = served(drafter, attend, [(0, features, embeddings, 21)], window=8)
    torch.testing.assert_close(hidden, expected(drafter, features[13:], 13, embeddings, 21), atol=1e-4, rtol=1e-4)


def test_no_row_of_the_pool_is_written_twice_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would be left to chance which of the two stays."""
    model = FusedDFlash(DFlashModel.load(write_drafter(tmp_path), torch.float32))
    table, pool = ContextTable(2, 8), ContextPool(model, 2, 8)
    written: list[list[int]] = []
    monkeypatch.setattr(pool, "_write", lambda rows, positions, features: written.append(rows.tolist()))
    one, two, other = ("link", "a"), ("link", "b"), ("other", "a")  # the last one takes a slot of the first link
    for key, start, count in ((one, 0, 6), (two, 0, 2), (one, 6, 6), (two, 9, 2), (other, 0, 3)):
        pool.stage(placed(table, key, start, count), torch.zeros(count, HIDDEN))
    pool.flush()
    assert [len(rows) for rows in written] == [8, 8, 3]
    assert all(len(rows) == len(set(rows)) for rows in written)


@pytest.mark.parametrize("attend", [AttendEach, AttendPadded])
def test_features_that_were_no_numbers_leave_nothing_in_their_slot(tmp_path: Path, attend: Any) -> None:
    torch.manual_seed(7)
    drafter = write_drafter(tmp_path)
    model = FusedDFlash(DFlashModel.load(drafter, torch.float32))
    table, pool = ContextTable(2, 32), ContextPool(model, 2, 32)
    long, short, embeddings = torch.randn(20, HIDDEN), torch.randn(3, HIDDEN), torch.randn(BLOCK, HIDDEN)
    with torch.inference_mode():
        pool.stage(placed(table, ("bad", "a"), 0, 20), torch.full((20, HIDDEN), float("nan")))
        pool.flush()
        table.free(("bad", "a"))
        blocks = []
        for name, features in ("short", short), ("long", long):
            placement = placed(table, ("good", name), 0, len(features))
            pool.stage(placement, features)
            base = len(features)
            blocks.append(Block(pool.first_row(placement.context), base, base, BLOCK, False))
        pool.flush()
        assert blocks[0].first_row == 0, "the short context is to follow the bad one in its slot"
        positions = torch.cat([torch.arange(block.base, block.base + BLOCK) for block in blocks])
        attending = attend(model, pool, blocks, positions)
        embedded, places = torch.cat([embeddings, embeddings]), torch.arange(BLOCK).repeat(2)
        hidden = model.final_norm(model.forward(embedded, positions, attending, places))
    for rows, features in zip(hidden.split(BLOCK), (short, long)):
        right = expected(drafter, features, 0, embeddings, len(features))
        torch.testing.assert_close(rows, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    drafter = write_drafter(tmp_path, scale=0.1)
    model = FusedDFlash(DFlashModel.load(drafter, dtype))
    table, pool = ContextTable(1, 32), ContextPool(model, 1, 32)
    features, embeddings = torch.randn(9, HIDDEN), torch.randn(BLOCK, HIDDEN)
    with torch.inference_mode():
        pool.stage(placed(table, ("link", "a"), 0, 9), features)
        pool.flush()
        places = torch.arange(9, 9 + BLOCK)
        attend = AttendEach(model, pool, [Block(0, 9, 9, BLOCK, False)], places)
        hidden = model.final_norm(model.forward(embeddings.to(dtype), places, attend, places - 9))
    right = expected(drafter, features, 0, embeddings, 9)
    assert hidden.dtype == dtype
    assert torch.nn.functional.cosine_similarity(hidden.float(), right).min() > 0.999


def test_angles_are_exact_in_half_precision_far_into_a_context(tmp_path: Path) -> None:
    model = DFlashModel.load(write_drafter(tmp_path), torch.bfloat16)
    place, head_dim = 100_003, 8
    cos, sin = model.rotary(model.norm.weight, torch.tensor([place]))
    angles = place * 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    torch.testing.assert_close(cos[0].double(), angles.cos().repeat(2), atol=0.01, rtol=0)
    torch.testing.assert_close(sin[0].double(), angles.sin().repeat(2), atol=0.01, rtol=0)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_every_kind_of_rope_is_the_one_of_transformers(tmp_path: Path, kind: str) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3RotaryEmbedding

    extra = {"factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 5000.0} | {
        key: value
        for key, value in extra.items()
        if (kind in ("linear", "yarn") and key == "factor")
        or kind == "llama3"
        or (kind == "yarn" and key == "original_max_position_embeddings")
    }
    model = DFlashModel.load(write_drafter(tmp_path, rope_parameters=rope), torch.float32)
    raw = {key: value for key, value in model.dflash.raw.items() if key != "architectures"}
    positions = torch.arange(0, 200, 7)[None]
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**raw))(model.norm.weight, positions)
    for ours, right in zip(model.rotary(model.norm.weight, positions), theirs):
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of 3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ],
)
def test_a_configuration_that_no_draft_model_has_is_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(DraftCheckpointError, match=part):
        DFlashModel(DFlashConfig.from_dict(draft_config(**changes), Path("drafter")))


def test_a_padded_context_row_is_seen_by_no_block(tmp_path: Path) -> None:
    torch.manual_seed(6)
    model = DFlashModel.load(write_drafter(tmp_path), torch.float32)
    features, embeddings = torch.randn(1, 6, HIDDEN), torch.randn(1, BLOCK, HIDDEN)
    positions, bases = torch.arange(4, 4 + BLOCK)[None], torch.full((1, BLOCK), 4)

    def hidden(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        masks = block_masks(model.dflash, positions, bases, places)
        return model(embeddings, positions, model.context_kv(rows, places), masks, positions - bases)

    padded = torch.tensor([[0, 1, 2, 3, PADDING, PADDING]])
    torch.testing.assert_close(hidden(features, padded), hidden(features[:, :4], padded[:, :4]))


def test_a_checkpoint_with_tensors_of_another_kind_of_drafter_is_refused(tmp_path: Path) -> None:
    drafter = write_drafter(tmp_path)
    weights = read_weights(drafter) | {"layers.0.attention_conv.base_kernel": torch.zeros(2, 2, HIDDEN)}
    write_checkpoint(drafter, DFlashModel.load(drafter, torch.float32).dflash.raw, weights)
    with pytest.raises(
        DraftCheckpointError, match=r"attention_conv.base_kernel.*config.json lacks \(conv_kernel_size, "
    ):
        DFlashModel.load(drafter, torch.float32)


@pytest.mark.parametrize("name", ["candidate_selector.successor_codebook", "layers.1.mlp_conv.base_kernel"])
def test_a_second_version_that_lacks_what_makes_it_one_is_refused(tmp_path: Path, name: str) -> None:
    drafter = write_drafter(tmp_path, **second())
    weights = read_weights(drafter)
    write_checkpoint(drafter, draft_config(**second()), {n: tensor for n, tensor in weights.items() if n != name})
    with pytest.raises(DraftCheckpointError, match=f"lacks the tensor '{name}'"):
        DFlashModel.load(drafter, torch.float32)


def test_codebooks_are_read_under_the_names_that_transformers_saves_too(tmp_path: Path) -> None:
    drafter = write_drafter(tmp_path, **second())
    weights = read_weights(drafter)
    renamed = {f"{n}.weight" if n.endswith("_codebook") else n: tensor for n, tensor in weights.items()}
    write_checkpoint(drafter, draft_config(**second()), renamed)
    codebook = "candidate_selector.predecessor_codebook"
    assert torch.equal(DFlashModel.load(drafter, torch.float32).state_dict()[codebook], weights[codebook])


def test_a_checkpoint_that_lacks_a_tensor_or_has_it_in_another_shape_is_refused(tmp_path: Path) -> None:
    drafter = write_drafter(tmp_path)
    config = DFlashModel.load(drafter, torch.float32).dflash.raw
    weights = read_weights(drafter)
    write_checkpoint(drafter, config, {name: tensor for name, tensor in weights.items() if name != "norm.weight"})
    with pytest.raises(DraftCheckpointError, match=r"lacks the tensor 'norm.weight'"):
        DFlashModel.load(drafter, torch.float32)
    write_checkpoint(drafter, config, weights | {"norm.weight": torch.ones(HIDDEN + 1)})
    with pytest.raises(DraftCheckpointError, match=rf"norm.weight is \({HIDDEN + 1},\).*asks for \({HIDDEN},\)"):
        DFlashModel.load(drafter, torch.float32)
