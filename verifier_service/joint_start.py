"""The start of several ranks: it succeeds on all of them, or ends on all of them at once and for the same reason.

A rank that waits in a collective hears of nothing else, and one whose neighbour has left says only that a connection
was closed. So ranks tell each other the outcome beside their collectives, in the store by which they met, where a
thread of each listens.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from cluster.errors import PacelineError

log = logging.getLogger(__name__)

LOAD_S = 1800.0  # for the slowest rank to have its weights, after the fastest
GRACE_S = 5.0  # for a rank that has heard of a failure to leave what it is doing by itself
HEARD_S = 2.0  # for the others to hear of a failure, before the rank that failed lets go of its connections
SUCCESS = "loaded"
VERDICT = "start/verdict"  # in the store: SUCCESS, or the first failure
COUNT = "start/loaded"
HEARD = "start/heard"


class RankFailedError(PacelineError):
    """Another rank could not start: which one, and what it said."""


class JointStart:
    """open_store: a new connection to the ranks' store. Begins to listen at once.

    A rank that does not leave within GRACE_S of another's failure is ended with its process: it may be in a collective
    that nobody will ever answer.
    """

    def __init__(self, open_store: Callable[[], dist.Store], rank: int, size: int):
        self._store, self._rank, self._size = open_store(), rank, size
        self._verdict = ""
        self._known, self._left = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, args=(open_store(),), name="joint-start", daemon=True).start()

    def meet(self) -> None:
        """Returns when every rank has called it. Raises RankFailedError once one cannot, TimeoutError after LOAD_S."""
        if self._store.add(COUNT, 1) == self._size:
            self._store.compare_set(VERDICT, "", SUCCESS)
        if not self._known.wait(LOAD_S):
            raise TimeoutError(f"not all {self._size} ranks had loaded {LOAD_S:g} s after rank {self._rank}")
        if self._verdict != SUCCESS:
            raise RankFailedError(self._verdict)

    def failed(self, error: Exception) -> Exception:
        """To be called once, with whatever ended this rank's start; what to raise: the first failure of any rank."""
        own = f"rank {self._rank} could not start: {type(error).__name__}: {error}"
        own = own.encode(errors="backslashreplace").decode()  # of a path that is no UTF-8
        try:
            first = self._store.compare_set(VERDICT, "", own).decode()
            until = time.monotonic() + HEARD_S
            while self._store.add(HEARD, 0) < self._size and time.monotonic() < until:
                time.sleep(0.01)
        except dist.DistError:  # the store is gone with rank 0, of which the thread may have heard before
            self._known.wait(HEARD_S)
            first = self._verdict or own
        self._left.set()
        return error if first in (own, SUCCESS) else RankFailedError(first)

    def _listen(self, store: dist.Store) -> None:
        try:
            store.wait([VERDICT], timedelta(seconds=2 * LOAD_S))
            self._verdict = store.get(VERDICT).decode()
            if self._verdict != SUCCESS:
                store.add(HEARD, 1)
        except dist.DistError as error:
            self._verdict = self._verdict or f"rank 0 left while ranks were loading ({str(error).splitlines()[0]})"
        self._known.set()
        if self._verdict == SUCCESS or self._left.wait(GRACE_S):
            return
        log.error("%s", self._verdict)
        print(self._verdict, file=sys.stderr, flush=True)
        os._exit(1)
