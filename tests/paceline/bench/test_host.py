"""The host bench runs the engine that serves, with nothing but the model left out."""

import json

from rich.console import Console

from paceline.bench.host import NAMES, HostOptions, measure, table, write_json


def test_plain_and_drafted_steps_are_measured_with_their_true_sizes(tmp_path):
    notes: list[str] = []
    rows = measure(HostOptions(requests=8, drafts=7, right=3, steps=12, repeats=1), lambda _, note: notes.append(note))
    plain, ahead, penalised, resting, drafted, linked = rows
    assert (plain.name, plain.tokens) == ("plain", 8)
    assert (ahead.name, ahead.tokens) == ("plain, ahead", 8)
    assert (penalised.name, penalised.tokens) == ("penalised, ahead", 8)
    assert (resting.name, resting.tokens) == ("resting", 8)
    assert (drafted.name, drafted.tokens) == ("drafted", 8 * 8)
    assert (linked.name, linked.tokens) == ("drafted, tcp", 8 * 8)
    assert 0 < plain.cpu_ms < drafted.cpu_ms
    assert drafted.packed_bytes > plain.packed_bytes > 0
    assert len(notes) == 6
    write_json(tmp_path / "host.json", rows, {})
    assert [row["name"] for row in json.loads((tmp_path / "host.json").read_text())["rows"]] == list(NAMES)
    console = Console(record=True, width=100)
    console.print(table(rows))
    assert "drafted" in console.export_text()
