"""`bench engine` end to end: real ranks, a real drafter process, a random pair."""

import json

import pytest
from typer.testing import CliRunner

from paceline.bench.cli import app

ROWS = ["plain", "disaggregated", "colocated", "transformers", "continuous", "published"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def f(n):", "class A", "import os, sys")))
    return path


def bench(pair, prompts, figures, *options):
    target, drafter = map(str, pair)
    command = ["engine", "--target", target, "--drafter", drafter, "--prompts", str(prompts), "--json", str(figures)]
    return CliRunner().invoke(app, [*command, "--max-tokens", "24", *options])


@pytest.mark.slow
def test_all_decoders_give_the_same_greedy_text_and_each_has_its_figures(pair, prompts, tmp_path):
    pytest.importorskip("dflash")
    figures, plot = tmp_path / "figures.json", tmp_path / "figures.png"
    options = ("--concurrency", "1", "--concurrency", "2", "--repeat", "2", "--plot", str(plot))
    result = bench(pair, prompts, figures, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["name"], row["concurrency"]) for row in rows] == [(name, level) for level in (1, 2) for name in ROWS]
    assert all(row["text"].startswith("equal") for row in rows), [row["text"] for row in rows]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    by_name = {row["name"]: row for row in rows if row["concurrency"] == 1}
    assert by_name["plain"]["ratio"] == 1
    assert by_name["plain"]["tau"]["overall"] == 1
    # The same drafter, the same context: every drafted row accepts the same tokens.
    taus = [by_name[name]["tau"]["overall"] for name in ("disaggregated", "colocated")]
    assert taus[0] == pytest.approx(taus[1], rel=0.1)
    assert 0 < by_name["disaggregated"]["draft_share"] < 1
    assert by_name["disaggregated"]["link_bytes"] >= 4 * 32  # a float32 vector of the hidden size
    assert by_name["colocated"]["link_bytes"] is None
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_sampled_text_is_the_same_drafted_plain_resting_and_in_deterministic_mode(pair, prompts, tmp_path):
    figures = tmp_path / "figures.json"
    options = ("--concurrency", "3", "--repeat", "1", "--temperature", "0.8", "--deterministic", "--resting")
    result = bench(pair, prompts, figures, *options)
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(figures.read_text())["rows"]}
    assert [rows[name]["text"] for name in (*ROWS[:3], "deterministic", "resting")] == ["equal"] * 5
    assert rows["transformers"]["text"] == ""
    assert rows["resting"]["tau"]["overall"] == 1


def test_a_missing_drafter_is_named_before_anything_starts(pair, prompts, tmp_path):
    result = bench((pair[0], tmp_path), prompts, tmp_path / "figures.json")
    assert result.exit_code == 2
    assert "--drafter" in result.output
    assert "Traceback" not in result.output
