"""A process that has loaded what it needs and now repeats one step: what the garbage collector is told then."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG = 50_000  # objects made between two collections; Python's own 700 are made twice in a step of 256 requests


@contextmanager
def settled() -> Iterator[None]:
    """Inside, what is loaded is walked by no collection (half a second beside torch and transformers), and the objects
    of a step, which go by their reference counts, set off a collection once in dozens of steps.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
