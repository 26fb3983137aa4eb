"""`bench steps` end to end: real processes write tables that can be read."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from paceline.bench.cli import app
from verifier_service.step_tables.tables import read_draft_table, read_verify_table


@pytest.mark.slow
def test_a_running_pair_is_timed_into_two_tables(pair, tmp_path):
    target, drafter = map(str, pair)
    sizes = ("--concurrency", "1", "--concurrency", "3", "--rows", "1", "--rows", "4", "--context", "20")
    command = [
        "steps",
        str(tmp_path),
        "--target",
        target,
        "--drafter",
        drafter,
        *sizes,
        "--steps",
        "6",
        "--repeat",
        "1",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    verify, draft = read_verify_table(tmp_path / "target.json"), read_draft_table(tmp_path / "target-dflash.json")
    assert {(step.requests, step.rows) for step in verify.verify} == {(1, 1), (1, 4), (3, 1), (3, 4)}
    assert {(step.contexts, step.rows) for step in draft.draft} == {(1, 4), (3, 4)}
    assert (verify.clock, verify.layers, draft.clock, draft.block_size) == ("engine", 3, "link", 4)


def test_rows_beyond_a_block_are_refused_before_anything_starts(pair, tmp_path):
    target, drafter = map(str, pair)
    done = CliRunner().invoke(app, ["steps", str(tmp_path), "--target", target, "--drafter", drafter, "--rows", "9"])
    assert done.exit_code == 2
    assert "--rows 9 is not between 1 and 4" in done.output
