"""The measurement of draft steps runs from end to end in a tiny shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from modeling.dflash_config import DFlash2
from tests.gpu.measure_draft import measure, write, write_table
from tests.gpu.random_drafter import DrafterShape
from verifier_service.step_tables.tables import read_draft_table

TINY = DrafterShape(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=48, vocabulary=60, block_size=4)


def test_a_tiny_drafter_is_measured_and_drafts_what_torch_drafts(tmp_path: Path):
    (step,) = measure(TINY, 20, (2,), torch.float32, "cpu", rate=1e9, repeats=1)
    assert (step.batch, step.context, step.agreement) == (2, 20, 1.0)
    assert 0 < step.weights_floor < step.floor < step.draft
    write(tmp_path, [step, replace(step, agreement=0.1)], 1e9)
    lines = (tmp_path / "draft.md").read_text().splitlines()
    assert [line.count("WRONG") for line in lines[-2:]] == [0, 1]
    assert len(json.loads((tmp_path / "draft.json").read_text())["steps"]) == 2
    write_table(tmp_path, "tiny", TINY.block_size, [step], {"device": "cpu"})
    table = read_draft_table(tmp_path / "drafts" / "tiny.json")
    assert [(each.contexts, each.rows, each.window) for each in table.draft] == [(2, 2, 20), (2, 4, 20)]
    assert 1e3 * table.draft_s(2, 4, 20) >= step.draft + step.inject - 1e-9


def test_a_whole_step_of_dflash_2_is_measured_and_says_so(tmp_path: Path):
    second = replace(TINY, layers=1, block_size=3, second=DFlash2(2, 4, 8, 5))
    (step,) = measure(second, 20, (1,), torch.float32, "cpu", rate=1e9, repeats=1)
    assert (step.second, step.agreement) == (True, 1.0)
    assert second.weights > replace(second, second=None).weights
    write(tmp_path, [step], 1e9)
    assert "| DFlash 2 | 1 | 20 |" in (tmp_path / "draft.md").read_text()
