"""The measurement of a whole pair runs from end to end in a tiny shape, and as many drafts stand as are to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.gpu.counting_pair import write_drafter, write_target
from tests.gpu.measure_pair import ARCHITECTURES, Load, forced_pair, write

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 80,
}
DRAFTER: dict[str, Any] = {
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_target_layers": 2,
    "block_size": 4,
    "dflash_config": {"mask_token_id": 79, "target_layer_ids": [0, 1]},
}


def test_a_tiny_counting_pair_says_what_it_counts_and_keeps_as_many_drafts_as_it_is_to(tmp_path: Path):
    target, drafter = tmp_path / "target", tmp_path / "drafter"
    write_target(ARCHITECTURES / "qwen3-8b.json", target, torch.float32, "cpu", **TINY, num_hidden_layers=2)
    write_drafter(ARCHITECTURES / "qwen3-8b-dflash.json", drafter, torch.float32, "cpu", **{**TINY, **DRAFTER})
    load = Load(concurrency=(1,), prompt=5, max_tokens=13, repeats=1)
    rows = list(forced_pair("tiny", target, drafter, "cpu", "float32", (1, 3), load))
    assert [(each.kept, each.right) for each in rows] == [(None, True), (1, True), (3, True)]
    assert [each.measured.tau.overall for each in rows if each.measured.tau] == [1.0, 1.0, 3.0]
    write(tmp_path, rows, {"device": "cpu"})
    assert [line.count("right") for line in (tmp_path / "pair.md").read_text().splitlines()[-3:]] == [1, 1, 1]
    assert len(json.loads((tmp_path / "pair.json").read_text())["rows"]) == 3
