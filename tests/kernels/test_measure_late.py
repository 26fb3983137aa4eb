"""The measurement of late tokens runs from end to end in a tiny shape: all run ahead, and say what they should."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.gpu.counting_pair import write_target
from tests.gpu.measure_late import NEEDS, Load, measure, write
from tests.gpu.measure_pair import ARCHITECTURES
from tests.kernels.test_measure_pair import TINY


def test_a_tiny_counting_target_runs_ahead_whatever_its_requests_want(tmp_path: Path):
    write_target(ARCHITECTURES / "qwen3-8b.json", tmp_path, torch.float32, "cpu", **TINY, num_hidden_layers=2)
    load = Load(requests=(9,), prompt=5, max_tokens=20, repeats=2)
    rows = list(measure(tmp_path, "cpu", torch.float32, "torch", load))
    assert [row.needs for row in rows] == list(NEEDS)
    assert all(row.right for row in rows)
    assert min(row.ahead for row in rows) > 0.8
    write(tmp_path, rows, {"device": "cpu"})
    assert (tmp_path / "late.md").read_text().count("right") == len(NEEDS)
    assert len(json.loads((tmp_path / "late.json").read_text())["rows"]) == len(NEEDS)
