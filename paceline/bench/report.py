"""The engine table on the screen, as JSON and as a plot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from paceline.bench.figures import Row, Skipped

ABSENT = "–"
HEADINGS = (
    "at\nonce",
    "tokens\n/ s",
    "x\nplain",
    "\ntau",
    "outside\nloops",
    "loop\nshare",
    "draft\nshare",
    "gap\nshare",
    "link\nbytes",
)


def table(rows: Sequence[Row], skipped: Sequence[Skipped], title: str) -> Table:
    made = Table(
        title=title,
        title_justify="left",
        caption=_caption(rows, skipped),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    made.add_column("decoder", no_wrap=True)
    for heading in HEADINGS:
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("\ntext", overflow="fold")
    for row in rows:
        tau = row.tau
        made.add_row(
            row.name,
            str(row.concurrency),
            f"{row.tokens_per_s:.1f}",
            _number(row.ratio, ".2f"),
            _number(tau.overall if tau else None, ".2f"),
            _number(tau.outside_loops if tau else None, ".2f"),
            _number(tau.loop_share if tau else None, ".0%"),
            _number(row.draft_share, ".0%"),
            _number(row.gap_share, ".0%"),
            _number(row.link_bytes, ".0f"),
            row.text or ABSENT,
        )
    return made


def write_json(
    path: Path, rows: Sequence[Row], skipped: Sequence[Skipped], settings: dict[str, Any], machine: dict[str, Any]
) -> None:
    content = {
        "machine": machine,
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "skipped": [asdict(entry) for entry in skipped],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Tokens per second of each decoder, a bar for each concurrency, whiskers from the slowest to the fastest run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.name for row in rows))
    levels = sorted({row.concurrency for row in rows})
    height = 0.8 / len(levels)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.3 * len(names) * len(levels)), layout="constrained")
    for index, level in enumerate(levels):
        chosen = [row for row in rows if row.concurrency == level]
        places = [names.index(row.name) + (index - (len(levels) - 1) / 2) * height for row in chosen]
        speeds = [row.tokens_per_s for row in chosen]
        spread = [
            [row.tokens_per_s - row.slowest for row in chosen],
            [row.fastest - row.tokens_per_s for row in chosen],
        ]
        bars = axes.barh(places, speeds, height, xerr=spread, label=f"concurrency {level}", capsize=2)
        axes.bar_label(bars, [f"{speed:.0f}" for speed in speeds], padding=4)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("tokens per second (median; whiskers: slowest to fastest run)")
    axes.set_title(textwrap.fill(title, 80), fontsize="medium")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def _caption(rows: Sequence[Row], skipped: Sequence[Skipped]) -> str:
    notes = {row.name: row.note for row in rows if row.note}
    lines = [
        "Outside loops: tau there. Draft share: of the step's time. Link bytes: per token of context.\n"
        "Text: against transformers' if greedy, else against plain's with the same seeds."
    ]
    lines += [f"{name}: {note}" for name, note in notes.items()]
    lines += [f"{entry.name}: skipped, {entry.reason}" for entry in skipped]
    return "\n".join(lines)
