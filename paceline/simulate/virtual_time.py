"""Virtual time: events in order, and processes that wait for them. The same seed gives the same run.

A process is ordinary code on a thread of its own, so that what serves can be driven as it is, waits included. One
thread runs at a time: whoever waits hands on to whatever comes next.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from types import TracebackType

Action = Callable[[], None]


class _Closing(BaseException):
    """Ends a process that waits. Not an Exception, which the code inside might handle."""


class VirtualTime:
    """Use: with VirtualTime() as time: time.process(...); time.run(until). Seconds since the start, as `now`."""

    def __init__(self) -> None:
        self.now = 0.0
        self._until = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Action | Process]] = []
        self._processes: list[Process] = []

    def __enter__(self) -> VirtualTime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            process.close()

    def at(self, when: float, action: Action | Process) -> None:
        """Call it, or let it look whether its wait is over, at `when`, which is not before now."""
        heapq.heappush(self._events, (max(when, self.now), next(self._order), action))

    def process(self, body: Callable[[Process], None]) -> Process:
        """Begins when time runs."""
        made = Process(self, body)
        self._processes.append(made)
        self.at(self.now, made)
        return made

    def run(self, until: float) -> None:
        """Until that moment; what a process or an action raises is raised here."""
        self._until = until
        while (action := self.next_event()) is not None:
            if isinstance(action, Process):
                action.resume()
            else:
                action()
        self.now = max(self.now, until)

    def next_event(self, own: Process | None = None) -> Action | Process | None:
        """Take the next event and move time to it. None: there is none until the end of the run, or, for a process that
        asks (`own`), it is another process' turn.
        """
        if not self._events or self._events[0][0] > self._until:
            return None
        action = self._events[0][2]
        if own is not None and action is not own and isinstance(action, Process):
            return None
        self.now = heapq.heappop(self._events)[0]
        return action


class Process:
    """One thread that runs only while nothing else does."""

    def __init__(self, time: VirtualTime, body: Callable[[Process], None]):
        self._time, self._body = time, body
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="process", daemon=True)

    # Called inside the process.

    def sleep(self, seconds: float) -> None:
        self.wait(_never, seconds)

    def wait(self, ready: Callable[[], bool], timeout_s: float = float("inf")) -> None:
        """Until `ready()` or the time is over. Looked at after `notify`, and while nobody else runs."""
        deadline = self._time.now + timeout_s
        if timeout_s < float("inf"):
            self._time.at(deadline, self)
        while not ready() and self._time.now < deadline:
            action = self._time.next_event(self)
            if action is None:
                self._pause()
            elif not isinstance(action, Process):
                action()

    # Called from outside.

    def notify(self) -> None:
        """What it waits for may have come."""
        self._time.at(self._time.now, self)

    def resume(self) -> None:
        """Let it run until it waits. Raises what it raised."""
        if self._closing:
            return
        if self._thread.ident is None:
            self._thread.start()
        self._mine.release()
        self._theirs.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        if self._thread.is_alive():
            self._closing = True
            self._mine.release()
            self._thread.join()

    def _pause(self) -> None:
        self._theirs.release()
        self._mine.acquire()
        if self._closing:
            raise _Closing

    def _run(self) -> None:
        self._mine.acquire()
        try:
            self._body(self)
        except _Closing:
            return
        except BaseException as error:  # raised again by whoever lets time run
            self._error = error
        self._closing = True
        self._theirs.release()


def _never() -> bool:
    return False
