"""What a model process without Ray owes to who started it: settings read or refused by key, and an end with it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

PARENT_CHECK_S = 0.5
Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(model: type[Settings], text: str) -> Settings | None:
    """From the JSON of `--settings`, or from standard input if that is "-": a command line is read by everybody, and
    settings hold a secret. None after a line on standard error for everything that is wrong with them."""
    if text == "-":
        text = sys.stdin.read()
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            print(f"--settings {'.'.join(map(str, item['loc']))}: {item['msg']}", file=sys.stderr)
        return None


def when_orphaned(parent: int, act: Callable[[], None]) -> None:
    """Call `act`, on another thread, once `parent` is not this process's parent any more.

    An orphan gets another parent. (A parent-death signal would come when the parent's *thread* ends.)
    """
    threading.Thread(target=_watch, args=(parent, act), name="parent-watch", daemon=True).start()


def _watch(parent: int, act: Callable[[], None]) -> None:
    waiting = threading.Event()
    while os.getppid() == parent:
        waiting.wait(PARENT_CHECK_S)
    act()
