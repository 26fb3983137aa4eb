"""Logs of Paceline's processes under Ray: one line an event on stderr, which Ray keeps in the session's log folder."""

from __future__ import annotations

import logging

# Other libraries' INFO lines are theirs to enable.
OURS = ("cluster", "deploy", "drafter_service", "modeling", "verifier_service")
FORMAT = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"


def configure_logs(level: int = logging.INFO) -> None:
    """Idempotent: Ray may reuse a process."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    for name in OURS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:] = [handler]
        logger.propagate = False
