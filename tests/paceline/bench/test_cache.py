"""The cache bench runs real engines; the commit bench compares two ways to the same state."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from paceline.bench import cache, commit

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny"


@pytest.mark.slow
def test_turns_of_conversations_find_what_was_said_and_change_no_text():
    options = cache.CacheOptions(TINY / "target", TINY / "drafter", conversations=1, turns=2, max_tokens=12)
    notes: list[str] = []
    with_cache, without = rows = cache.measure(options, lambda _, note: notes.append(note))
    assert with_cache.hit_rate > 0.2
    assert without.hit_rate == 0
    assert with_cache.text_equal == without.text_equal == 1
    assert with_cache.tau == without.tau > 1
    assert len(notes) == 4
    console = Console(record=True, width=120)
    console.print(cache.table(rows))
    assert "without" in console.export_text()


def test_replay_keeps_less_than_snapshots_and_commits_the_same_state():
    shape = commit.Shape("small", layers=2, heads=2, key_dim=16, value_dim=8, channels=32)
    replay, snapshots, fused = rows = commit.measure(shape, rows=3, block=4, repeats=1)
    assert replay.kept_bytes < snapshots.kept_bytes / 2
    assert fused.moved_bytes < replay.moved_bytes < snapshots.moved_bytes
    console = Console(record=True, width=120)
    console.print(commit.table(list(rows)))
    assert "snapshots" in console.export_text()
