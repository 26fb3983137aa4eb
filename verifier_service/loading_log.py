"""Progress of loading in a log: a line now and then, as there is no terminal to draw on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from modeling.weights import LoadProgress

PERIOD_S = 15.0
WIDTH = 24  # characters of the bar


def log_progress(log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> Callable[[LoadProgress], None]:
    """A listener for TargetRunner: logs a bar with tensors and bytes every PERIOD_S seconds, and the end."""
    last = clock()

    def told(progress: LoadProgress) -> None:
        nonlocal last
        now = clock()
        if progress.tensors < progress.total and now - last < PERIOD_S:
            return
        last = now
        filled = WIDTH * progress.tensors // max(progress.total, 1)
        log.info(
            "loading the target [%s%s] %d/%d tensors, %.1f GB on this rank",
            "#" * filled,
            "." * (WIDTH - filled),
            progress.tensors,
            progress.total,
            progress.bytes / 1e9,
        )

    return told
