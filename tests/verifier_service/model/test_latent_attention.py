"""Latent attention and its cache against transformers' stock forward: variants, both ways to attend, layouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modeling.families import FAMILIES
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.schedules import (
    BLOCK_TOKENS,
    Reference,
    reference,
    schedule,
    sequences,
    worst_difference,
)
from tests.verifier_service.model.test_runner import make_runner
from verifier_service.model.latent_attention import LatentAttention
from verifier_service.model.latent_shape import LatentShape
from verifier_service.model.runner import TargetRunner
from verifier_service.model.torch_executor import TorchExecutor
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

FAMILY = "deepseek_v3"
CACHED = 3 * (32 + 8)  # layers x (latent + rotary key)
KIMI = LatentShape(heads=64, content=128, rotary=64, value=128, latent=512)
VARIANTS: dict[str, dict[str, Any]] = {
    "queries of full rank": {"q_lora_rank": None},
    "rotary halves": {"rope_interleave": False},
    "groups of experts": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    "biases and two shared experts": {"attention_bias": True, "n_shared_experts": 2},
    "no yarn": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], Reference]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp(FAMILY)
    texts = sequences(4, tiny_targets.VOCABULARY, seed=4)
    return directory, texts, reference(tiny_targets.build(FAMILY, directory), texts)


def difference(runner: TargetRunner, texts: list[list[int]], expected: Reference, seed: int = 4) -> float:
    steps = schedule(texts, tiny_targets.VOCABULARY, seed)
    return worst_difference([runner.forward(step.plan) for step in steps], steps, expected, ())[0]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_stock_forwards_logits(variant, target, tmp_path):
    model = tiny_targets.build(FAMILY, tmp_path, **VARIANTS[variant])
    texts = target[1][:3]
    expected = reference(model, texts)
    assert difference(make_runner(tmp_path), texts, expected) < 1e-4
    assert difference(make_runner(target[0]), texts, expected) > 1e-2  # it is another model


@pytest.mark.parametrize("expands", [True, False])
def test_either_way_to_attend_has_the_stock_forwards_logits(expands, target, monkeypatch):
    monkeypatch.setattr(LatentShape, "expands", lambda *_: expands)
    directory, texts, expected = target
    assert difference(make_runner(directory), texts, expected) < 1e-4


def test_decoding_attends_to_latents_and_a_long_chunk_to_expanded_heads(target):
    absorbed = mock.patch.object(LatentAttention, "_absorbed", autospec=True, side_effect=LatentAttention._absorbed)
    expanded = mock.patch.object(LatentAttention, "_expanded", autospec=True, side_effect=LatentAttention._expanded)
    runner = make_runner(target[0])
    tokens = tuple(range(100))
    blocks = tuple((0, block) for block in range(26))
    with absorbed as few, expanded as many:
        runner.forward(StepPlan(0, new_blocks=blocks, prefill=(PrefillChunk(0, 0, tokens, True),)))
        assert (few.call_count, many.call_count) == (0, 3)
        runner.forward(StepPlan(1, verify=(VerifyRow(0, 100, (1, 2, 3)),)))
        assert (few.call_count, many.call_count) == (3, 3)


def test_pieces_of_rows_and_of_heads_equal_the_whole(target, monkeypatch):
    monkeypatch.setattr("verifier_service.model.step.PIECE", 7)
    monkeypatch.setattr("verifier_service.model.latent_attention.ENTRIES", 1000)
    directory, texts, expected = target
    assert difference(make_runner(directory), texts, expected) < 1e-4


@given(rows=st.integers(1, 4096), context=st.integers(1, 100_000))
def test_the_cheaper_way_to_attend_is_taken(rows, context):
    maps = KIMI.latent * (KIMI.content + KIMI.value)
    absorbed = rows * maps + rows * context * (2 * KIMI.latent + KIMI.rotary)
    expanded = context * maps + rows * context * (KIMI.content + KIMI.rotary + KIMI.value)
    assert KIMI.expands(rows, context) == (expanded < absorbed)
    assert not KIMI.expands(min(rows, 16), max(context, 32))


@given(heads=st.sampled_from([1, 8, 16, 64, 128]), rows=st.integers(1, 8192))
def test_sections_over_kernels_take_bounded_memory_whatever_the_heads(heads, rows):
    shape = replace(KIMI, heads=heads)
    assert shape.section % 128 == 0
    keys_and_values = shape.section * heads * (KIMI.content + KIMI.value)
    assert 1 << 25 < keys_and_values <= 1 << 26
    latents, sums = shape.section * KIMI.cached, rows * heads * (KIMI.value + 2)
    assert shape.workspace_bytes(rows, 2) == 2 * (keys_and_values + latents) + 4 * sums


def test_a_tokens_cache_is_its_latent_and_rotary_key(target):
    runner = make_runner(target[0], num_blocks=10)
    assert runner.shape.kv_bytes_per_token == CACHED * 4
    executor = runner._executor
    assert isinstance(executor, TorchExecutor)
    held = sum(cache.nbytes for cache in executor._builder.latents.values())
    assert held == 10 * BLOCK_TOKENS * runner.shape.kv_bytes_per_token
    assert not executor._builder.caches


def test_positions_far_beyond_the_original_context_have_the_stock_forwards_logits(target, tmp_path):
    model = tiny_targets.build(FAMILY, tmp_path)
    tokens = [(7 * i * i + i) % tiny_targets.VOCABULARY for i in range(1024)]  # 32 x original_max_position_embeddings
    want = reference(model, [tokens]).logits[0]
    runner = make_runner(tmp_path, num_blocks=256)
    blocks = tuple((0, block) for block in range(256))
    first = runner.forward(StepPlan(0, new_blocks=blocks, prefill=(PrefillChunk(0, 0, tuple(tokens[:700]), True),)))
    last = runner.forward(StepPlan(1, prefill=(PrefillChunk(0, 700, tuple(tokens[700:1018]), True),)))
    verified = runner.forward(StepPlan(2, verify=(VerifyRow(0, 1018, tuple(tokens[1018:])),)))
    for output, expected in ((first, want[699:700]), (last, want[1017:1018]), (verified, want[1018:])):
        torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=0)


def test_scores_of_experts_are_corrected_in_float32_in_any_dtype(target):
    runner = make_runner(target[0], dtype=torch.bfloat16)
    moe: Any = runner._model.layers[1].mlp
    assert torch.equal(moe.route.correction, stored(target[0])["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert moe.router_dtype == torch.float32


@pytest.mark.parametrize("nested", [True, False])
def test_kimis_published_layout_is_served(nested, target, tmp_path):
    """K2.5: text tower of a multimodal checkpoint. K2: the text model alone, of a type that transformers lacks."""
    directory, texts, expected = target
    text = json.loads((directory / "config.json").read_text())
    rope = text.pop("rope_parameters")
    text |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    tensors = stored(directory)
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in tensors  # stored one by one
    if nested:
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        tensors["vision_tower.patch_embed.proj.weight"] = torch.zeros(2)
        auto_map = {"AutoConfig": "configuration_kimi_k25.KimiK25Config"}
        text = {"model_type": "kimi_k25", "auto_map": auto_map, "text_config": text, "vision_config": {"depth": 1}}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert difference(make_runner(tmp_path), texts, expected) < 1e-4


def test_kimi_is_of_deepseeks_family():
    assert FAMILIES["kimi_k2"] is FAMILIES[FAMILY]
