"""After a failure in drafting: the failed proposer is ended and a fresh one built, beside steps that decode plainly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from verifier_service.proposers.face import Proposer

log = logging.getLogger(__name__)

FIRST_DELAY_S, LAST_DELAY_S = 1.0, 60.0
END_S = 5.0


class Renewal:
    """Builds the successor of a proposer that failed, after 1 s, then 2 s, ... up to a minute while it keeps failing.

    build: makes a proposer, on a thread of its own; whatever it raises is logged, and tried again. One that has lasted
    for a minute is forgiven its failure.
    """

    def __init__(self, build: Callable[[], Proposer]):
        self._build = build
        self._delay_s = FIRST_DELAY_S
        self._lock = threading.Lock()
        self._built: Proposer | None = None
        self._built_at = -LAST_DELAY_S
        self._stopped = threading.Event()

    def begin(self, failed: Proposer) -> None:
        """End the failed one and build another. Returns at once; not to be called again before `take` had that one."""
        if time.monotonic() - self._built_at >= LAST_DELAY_S:
            self._delay_s = FIRST_DELAY_S
        threading.Thread(target=self._run, args=(ended(failed),), name="renew-drafting", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether a successor waits to be taken."""
        return self._built is not None

    def take(self) -> Proposer | None:
        """The successor, once, when it has been built."""
        if self._built is None:
            return None
        with self._lock:
            built, self._built = self._built, None
            return built

    def stop(self) -> None:
        """Nothing is handed out from now on."""
        self._stopped.set()
        if (built := self.take()) is not None:
            ended(built)

    def _run(self, ending: threading.Thread) -> None:
        ending.join(END_S)  # a colocated drafter's memory has to be free before there is room for another
        while not self._stopped.wait(self._delay_s):
            self._delay_s = min(2 * self._delay_s, LAST_DELAY_S)
            try:
                fresh = self._build()
            except Exception as error:
                log.warning("drafting cannot be renewed, next attempt in %g s: %r", self._delay_s, error)
                continue
            with self._lock:
                self._built, self._built_at = fresh, time.monotonic()
            if self._stopped.is_set():
                self.stop()
            return


def ended(proposer: Proposer) -> threading.Thread:
    """Stops a proposer on a thread of its own: one that does not answer must hold up neither steps nor the end."""
    thread = threading.Thread(target=proposer.stop, name="stop-drafting", daemon=True)
    thread.start()
    return thread
