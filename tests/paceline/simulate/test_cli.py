"""`paceline simulate` from the command line: what it reads, what it refuses, what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster.errors import ConfigError
from paceline.plan.reading import Options
from paceline.simulate.cli import simulate
from paceline.simulate.setup import describe, survival_of

TINY = "deploy/tiny.yaml"
VERIFY = {
    "format": 1,
    "shape": "tiny",
    "layers": 4,
    "ranks": 2,
    "verify": [
        {"requests": requests, "rows": rows, "context": 64, "seconds": 0.003 + 1e-4 * requests * rows}
        for requests in (1, 8)
        for rows in (1, 8)
    ],
}
DRAFT = {
    "format": 1,
    "shape": "tiny-dflash",
    "block_size": 8,
    "draft": [{"contexts": 1, "rows": 8, "window": 64, "seconds": 0.001}],
}


@pytest.fixture
def tables(tmp_path: Path) -> Options:
    verify, draft = tmp_path / "verify.json", tmp_path / "draft.json"
    verify.write_text(json.dumps(VERIFY))
    draft.write_text(json.dumps(DRAFT))
    return Options(steps=verify, drafts=draft)


def run(*arguments: str):
    app = typer.Typer()
    app.command()(simulate)
    return CliRunner().invoke(app, list(arguments))


def test_a_sweep_says_where_drafting_pays_and_how_many_drafters_are_enough(tables, tmp_path):
    out = tmp_path / "out.json"
    levels = ("--concurrency", "1", "--concurrency", "8", "--drafters", "1", "--drafters", "2", "--seconds", "1")
    lengths = ("--prompt", "16", "--output", "50", "--acceptance", "3", "--drafter-slow", "2")
    done = run(
        TINY, "--steps", str(tables.steps), "--drafts", str(tables.drafts), *levels, *lengths, "--json", str(out)
    )
    assert done.exit_code == 0, done.output
    for part in ("measured: tiny on an unnamed device", "with 2 drafters", "drafters that give 90%", "2 times as slow"):
        assert part in done.output
    written = json.loads(out.read_text())
    assert [(level["load"]["concurrency"], level["drafters"]) for level in written["levels"]] == [
        (1, 1),
        (1, 2),
        (8, 1),
        (8, 2),
    ]
    first = written["levels"][0]
    assert first["speedup"] == pytest.approx(first["drafted"]["tokens_per_s"] / first["plain"]["tokens_per_s"])


def test_requests_that_no_kv_cache_holds_and_time_without_end_are_refused(tables):
    done = run(TINY, "--steps", str(tables.steps), "--drafts", str(tables.drafts), "--prompt", "100000000")
    assert done.exit_code == 2
    assert "--prompt 100000000 and --output 256 come to requests of up to 100000384 tokens" in done.output
    assert run(TINY, "--seconds", "inf").exit_code == 2


def test_without_a_table_or_a_gpu_type_nothing_can_be_priced():
    done = run(TINY)
    assert done.exit_code == 2
    assert "--steps" in done.output
    assert "--gpu" in done.output


def test_without_a_table_it_says_that_seconds_are_estimated():
    described = describe(Path("deploy/qwen3-8b.yaml"), Options(gpu="H200", drafter_gpu="L40S"))
    assert described.setup.target.title == "estimated, no table: roofline of 1 x H200"
    assert described.setup.drafting is not None
    assert described.setup.drafting.times.title == "estimated, no table: roofline of one L40S"


def test_a_table_of_some_of_the_layers_is_scaled_and_says_so(tables):
    target = describe(Path(TINY), tables).setup.target
    whole = target.step_s(1, 1, 64, 0)
    verify = {**VERIFY, "layers": 2}
    assert tables.steps is not None
    tables.steps.write_text(json.dumps(verify))
    half = describe(Path(TINY), tables).setup.target
    assert "times 4/2 layers" in half.title
    assert half.step_s(1, 1, 64, 0) == pytest.approx(2 * whole)


def test_a_table_of_another_drafter_is_refused(tables):
    assert tables.drafts is not None
    tables.drafts.write_text(json.dumps({**DRAFT, "block_size": 16}))
    with pytest.raises(ConfigError, match=r"draft.json: block_size is 16, the drafter's is 8"):
        describe(Path(TINY), tables)


def test_acceptance_is_tokens_a_step_or_the_chances_themselves():
    assert sum(survival_of("3.5", 8)) == pytest.approx(2.5)
    assert survival_of("0.8,0.5", 4) == (0.8, 0.5, 0.0)
    for wrong in ("9", "0.5,0.8", "1.2,1", "x", "0.9,0.8,0.7,0.6"):
        with pytest.raises(ConfigError, match="--acceptance is"):
            survival_of(wrong, 4)
