"""The server table on the screen, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from paceline.bench.load import Level
from paceline.bench.percentiles import Percentiles

ABSENT = "–"


def table(levels: Sequence[Level], title: str) -> Table:
    caption = "ms: p50 / p90 / p99. ITL: between chunks with text, which may hold several tokens; TPOT: per token."
    if not all(level.tokens_counted_by_server for level in levels):
        caption += "\nThe server sends no usage: tokens are chunks with text."
    made = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("at once", "requests", "errors", "tokens/s", "TTFT ms", "ITL ms", "TPOT ms", "request ms"):
        made.add_column(heading, justify="right")
    for level in levels:
        errors = ", ".join(f"{count} {kind}" for kind, count in sorted(level.errors.items()))
        made.add_row(
            str(level.concurrency),
            str(level.requests),
            errors or "0",
            f"{level.tokens_per_s:.1f}",
            *(_cell(value) for value in (level.ttft, level.itl, level.per_token, level.total)),
        )
    return made


def write_json(path: Path, levels: Sequence[Level], settings: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "levels": [asdict(level) for level in levels]}
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def plot(path: Path, levels: Sequence[Level], title: str) -> None:
    """Throughput, time to first token and inter-token latency against concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, first, between) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    places = [level.concurrency for level in levels]
    speed.plot(places, [level.tokens_per_s for level in levels], marker="o")
    speed.set_title("tokens per second")
    latencies = ((first, "ttft", "time to first token, ms"), (between, "itl", "inter-token latency, ms"))
    for axes, name, heading in latencies:
        known = [level for level in levels if getattr(level, name) is not None]
        for percent in ("p50", "p90", "p99"):
            values = [getattr(getattr(level, name), percent) for level in known]
            axes.plot([level.concurrency for level in known], values, marker="o", label=percent)
        axes.set_title(heading)
        axes.legend()
    for axes in (speed, first, between):
        axes.set_xlabel("concurrency")
        axes.set_xticks(places)
        axes.set_ylim(bottom=0)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _cell(value: Percentiles | None) -> str:
    return ABSENT if value is None else f"{value.p50:.0f} / {value.p90:.0f} / {value.p99:.0f}"
