import io
import json

from rich.console import Console

from paceline.bench import report
from paceline.bench.figures import Row, Skipped
from paceline.bench.interleave import order
from paceline.bench.loops import Tau

PLAIN = Row("plain", 1, 100.0, 90.0, 110.0, 1.0, None, None, None, None, "equal")
DRAFTED = Row(
    "drafted", 8, 250.0, 200.0, 300.0, 2.5, Tau(3.5, 3.25, 0.25), 0.125, 0.01, 1024.0, "equal, 1 of 8 by ties"
)
SKIPPED = [Skipped("published loop", "the package dflash is not installed")]


def shown(table):
    screen = io.StringIO()
    Console(width=200, file=screen).print(table)
    return screen.getvalue()


def test_the_table_shows_every_figure_and_why_a_row_is_missing():
    text = shown(report.table([PLAIN, DRAFTED], SKIPPED, "title"))
    line = next(line for line in text.splitlines() if "drafted" in line)
    figures = ["8", "250.0", "2.50", "3.50", "3.25", "25%", "12%", "1%", "1024"]
    assert line.split() == ["drafted", *figures, *["equal,", "1", "of", "8", "by", "ties"]]
    assert "published loop: skipped, the package dflash is not installed" in text


def test_what_does_not_apply_is_a_dash():
    line = next(
        line for line in shown(report.table([PLAIN], [], "title")).splitlines() if line.strip().startswith("plain")
    )
    assert line.count(report.ABSENT) == 6


def test_json_holds_rows_skipped_settings_and_machine(tmp_path):
    path = tmp_path / "new" / "figures.json"
    report.write_json(path, [DRAFTED], SKIPPED, {"repeats": 3}, {"cores": 2})
    content = json.loads(path.read_text())
    assert content["rows"][0]["tau"]["outside_loops"] == 3.25
    assert content["skipped"][0]["name"] == "published loop"
    assert (content["settings"], content["machine"]) == ({"repeats": 3}, {"cores": 2})


def test_a_plot_is_written_even_if_a_decoder_has_one_concurrency_only(tmp_path):
    path = tmp_path / "plot.png"
    report.plot(path, [PLAIN, DRAFTED], "title")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_second_repeat_runs_backwards():
    assert order(["a", "b", "c"], 3) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
