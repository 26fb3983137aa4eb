"""A TLS connection with the few socket calls that a Connection makes: one thread reads while others write.

Python's own SSLSocket has neither sendmsg nor MSG_DONTWAIT, and may not be read and written at once. Here the TLS
engine works on memory under a lock, and the system calls are made on the plain socket outside of it.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_READ_BYTES = 256 << 10
_CHUNK_BYTES = 64 << 10


class TlsSocket:
    """Takes over a connected, blocking socket. Errors of TLS itself are ssl.SSLError, which is an OSError."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_side: bool):
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._lock = threading.Lock()
        self._unsent: memoryview = memoryview(b"")  # encrypted bytes that the kernel had no room for
        self._owed = 0  # plain bytes in `unsent`, which sendmsg has not reported yet

    def handshake(self, receive: Callable[[], bytes]) -> None:
        """receive: some bytes from the socket, with the caller's deadline. Raises ssl.SSLError."""
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    return
                except ssl.SSLWantReadError:
                    self._socket.sendall(self._outgoing.read())
                    self._incoming.write(receive())
        finally:
            self._socket.sendall(self._outgoing.read())  # the last message, or the alert that says what is wrong

    def recv_into(self, target: memoryview) -> int:
        """Plain bytes; 0 at the end. Raises BlockingIOError when SO_RCVTIMEO has passed."""
        while True:
            with self._lock:
                try:
                    return self._tls.read(len(target), target)  # type: ignore[return-value]
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLZeroReturnError:
                    return 0
            encrypted = self._socket.recv(_READ_BYTES)
            if not encrypted:
                return 0
            with self._lock:
                self._incoming.write(encrypted)

    def sendmsg(self, parts: Sequence[Any], ancillary: Sequence[Any] = (), flags: int = 0) -> int:
        """How many of the plain bytes are out. What was encrypted but found no room is counted by a later call, which
        has to begin with the same bytes. Raises BlockingIOError if there is no room at all."""
        with self._lock:
            self._flush(flags)
            sent, self._owed = self._owed, 0
            for chunk in _chunks(parts, sent):
                self._tls.write(chunk)
                self._unsent = memoryview(self._outgoing.read())
                self._owed = len(chunk)
                try:
                    self._flush(flags)
                except BlockingIOError:
                    if sent == 0:
                        raise
                    return sent
                sent, self._owed = sent + self._owed, 0
            return sent

    def _flush(self, flags: int) -> None:
        while self._unsent:
            self._unsent = self._unsent[self._socket.send(self._unsent, flags) :]

    def fileno(self) -> int:
        return self._socket.fileno()

    def getsockname(self) -> Any:
        return self._socket.getsockname()

    def getpeername(self) -> Any:
        return self._socket.getpeername()

    def setsockopt(self, *arguments: Any) -> None:
        self._socket.setsockopt(*arguments)

    def shutdown(self, how: int) -> None:
        self._socket.shutdown(how)

    def close(self) -> None:
        self._socket.close()


def _chunks(parts: Sequence[Any], skip: int) -> Iterator[bytes]:
    """All bytes of the parts after the first `skip`, small parts joined: a TLS record has a price of its own."""
    held: list[memoryview] = []
    size = 0
    for part in parts:
        view = memoryview(part)[skip:]
        skip = max(0, skip - len(part))
        while view:
            held.append(view[: _CHUNK_BYTES - size])
            view = view[_CHUNK_BYTES - size :]
            size += len(held[-1])
            if size == _CHUNK_BYTES:
                yield b"".join(held)
                held, size = [], 0
    if held:
        yield b"".join(held)
