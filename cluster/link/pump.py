"""The thread of an end that writes in the background: heartbeats, and what the kernel had no room for."""

from __future__ import annotations

import math
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from cluster.link.connection import Connection


class Pump:
    """Beats every `period_s` on all watched connections; closes one whose full queue stands still for `patience_s`.

    beat: returns the heartbeat's frame; it must not raise.
    """

    def __init__(self, name: str, period_s: float, patience_s: float, beat: Callable[[], bytes]):
        self._period = period_s
        self._patience = patience_s
        self._beat = beat
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._stopping = False
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def watch(self, connection: Connection) -> None:
        with self._lock:
            self._connections.add(connection)
        self.wake()

    def forget(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def wake(self) -> None:
        with suppress(OSError):  # full: it is ringing already; closed: nobody listens any more
            self._button.send(b"!")

    def stop(self, timeout_s: float = 5.0) -> None:
        self._stopping = True
        self.wake()
        self._thread.join(timeout_s)
        self._button.close()
        if not self._thread.is_alive():
            self._bell.close()

    def _run(self) -> None:
        next_beat = time.monotonic() + self._period
        while not self._stopping:
            self._flush_until(next_beat)
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._period
                frame = self._beat()
                for connection in self._watched():
                    connection.beat(frame, self._patience)

    def _flush_until(self, moment: float) -> None:
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        blocked = {}
        for connection in self._watched():
            fd = connection.fileno()
            if connection.blocked and fd >= 0:
                poller.register(fd, select.POLLOUT)
                blocked[fd] = connection
        for fd, _ in poller.poll(max(0, math.ceil((moment - time.monotonic()) * 1e3))):
            if fd in blocked:
                blocked[fd].flush()
            else:
                with suppress(BlockingIOError):
                    self._bell.recv(4096)

    def _watched(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)
