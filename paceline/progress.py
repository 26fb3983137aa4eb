"""A progress bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOG_PERIOD_S = 15.0


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields advance(count, note). On a terminal a rich bar; elsewhere one plain line every 15 seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")
            yield lambda count, note: progress.update(task, advance=count, note=note)
        return
    state = {"done": done, "printed": time.monotonic()}

    def advance(count: int, note: str) -> None:
        state["done"] += count
        if time.monotonic() - state["printed"] >= LOG_PERIOD_S or state["done"] == total:
            state["printed"] = time.monotonic()
            print(f"{title} {state['done']}/{total} {note}", file=sys.stderr, flush=True)

    yield advance
