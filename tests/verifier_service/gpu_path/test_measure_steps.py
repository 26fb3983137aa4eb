"""The measurement of verify steps runs from end to end in a tiny shape."""

from __future__ import annotations

import json

import pytest
import torch

from tests.gpu.measure_steps import ARCHITECTURES, measure, write
from tests.gpu.random_target import cut
from tests.gpu.step_trace import idle_share

TINY = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 90,
}
HYBRID = {
    **TINY,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "num_attention_heads": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


def test_a_tiny_target_is_measured_beside_the_stock_one(tmp_path):
    part = cut(ARCHITECTURES / "qwen3-8b.json", 1, tmp_path / "model", **TINY)
    record = measure("tiny", part, (1,), (1, 2), (20,), torch.float32, "cpu", 1e9, repeats=1, stock=True)
    assert [(step["rows"], step["context"]) for step in record["verify"]] == [(1, 20), (2, 20)]
    assert all(0 < step["floor_seconds"] < step["seconds"] for step in record["verify"])
    assert all(step["stock_seconds"] > 0 for step in record["verify"])
    assert record["forced_acceptance"][0]["kept"] == 1
    write(tmp_path, record)
    assert json.loads((tmp_path / "steps" / "tiny.json").read_text()) == record
    assert (tmp_path / "steps.md").read_text().count("| tiny |") == 2


def test_one_ranks_slice_of_a_hybrid_is_measured_alone(tmp_path):
    part = cut(ARCHITECTURES / "qwen3.5-397b-a17b.json", 4, tmp_path / "model", ranks=8, **HYBRID)
    record = measure("slice", part, (1,), (1,), (20,), torch.float32, "cpu", 1e9, repeats=1)
    assert (record["ranks"], record["layers"], len(record["verify"])) == (8, 4, 1)


def test_time_between_kernels_is_what_none_of_them_covers():
    assert idle_share([(0, 4), (1, 3), (6, 10)]) == pytest.approx(0.2)
    assert idle_share([]) is None
