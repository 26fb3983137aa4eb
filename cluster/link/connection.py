"""One TCP connection of a link: framed messages in, read by one thread; frames and rows out, written by any thread.

Writes never block and never raise. What the kernel does not take at once waits in a queue that is bounded in bytes; a
queue over its bound closes the connection, so a slow peer costs itself its link and nobody else anything.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from cluster.errors import SecretError
from cluster.link.tls_socket import TlsSocket
from cluster.wire import LENGTH, Codec

T = TypeVar("T")
U = TypeVar("U")
Part = bytes | memoryview

MAX_CONTROL_BYTES = 1 << 20
HOLD_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_MAX_PARTS = 512  # of one sendmsg; IOV_MAX is 1024 on Linux


class Connection(Generic[T]):
    """Owns a connected socket. `codec` decodes what the peer sends. All times in seconds, sizes in bytes.

    on_blocked: called (under the write lock) when the kernel's buffer is full; somebody must then call `flush` once
    the socket is writable again. `reason` says why the connection was closed, None while it is open.
    """

    def __init__(self, sock: socket.socket, codec: Codec[T], max_queued: int, on_blocked: Callable[[], None]):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket: socket.socket | TlsSocket = sock
        self._codec = codec
        self._max_queued = max_queued
        self._on_blocked = on_blocked
        self._deadline: float | None = None
        self._buffer = memoryview(bytearray(LENGTH.size + codec.max_bytes))
        self._begin = 0
        self._end = 0
        self._unread: T | None = None
        self._lock = threading.Lock()
        self._queue: deque[Part] = deque()
        self._released = False
        self._progress = time.monotonic()
        self.queued_bytes = 0
        self.sent_bytes = 0
        self.blocked = False
        self.reason: str | None = None
        self.overflowed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def local_host(self) -> str:
        return str(self._socket.getsockname()[0])

    @property
    def peer_host(self) -> str:
        return str(self._socket.getpeername()[0])

    # Reading: by the one thread that owns the connection.

    def silence_after(self, seconds: float) -> None:
        """From now on a read that gets nothing for `seconds` raises TimeoutError."""
        self._deadline = None
        self._set_timeout(seconds)

    def deadline_in(self, seconds: float) -> None:
        """From now on reads raise TimeoutError once `seconds` have passed, however the bytes trickle in."""
        self._deadline = time.monotonic() + seconds

    def start_tls(self, context: ssl.SSLContext | None, server_side: bool) -> None:
        """Before anything is sent or received; None = stay as it is. Raises SecretError, or as `receive`."""
        if context is None:
            return
        plain = self._socket
        assert isinstance(plain, socket.socket), "TLS begins once"
        secured = TlsSocket(plain, context, server_side)
        received = memoryview(bytearray(_READ_BYTES))
        try:
            secured.handshake(lambda: bytes(received[: self._read(received)]))
        except ssl.SSLError as error:
            raise SecretError(
                f"TLS with the other end failed ({error.reason or error}): give all services of the application "
                "verifier.link.tls, with certificates of one authority"
            ) from error
        self._socket = secured

    def receive(self) -> T:
        """Next message. Raises ConnectionError (closed by either side), TimeoutError or ProtocolError."""
        if self._unread is not None:
            message, self._unread = self._unread, None
            return message
        return self.receive_as(self._codec)

    def receive_as(self, codec: Codec[U]) -> U:
        """Next message as one of another union, e.g. before the peer is known. Raises as `receive`."""
        length = codec.check_length(bytes(self._take(LENGTH.size)))
        return codec.decode(self._take(length))

    def receive_ready(self) -> T | None:
        """The next message if all of it has already been read from the socket, else None."""
        held = self._end - self._begin
        if self._unread is None and (
            held < LENGTH.size or held < LENGTH.size + LENGTH.unpack_from(self._buffer, self._begin)[0]
        ):
            return None
        return self.receive()

    def unread(self, message: T) -> None:
        """Put the message back that was received last."""
        self._unread = message

    def receive_into(self, target: memoryview) -> None:
        """Fill `target` with the bytes that follow the last message."""
        held = min(self._end - self._begin, len(target))
        target[:held] = self._buffer[self._begin : self._begin + held]
        self._begin += held
        while held < len(target):
            held += self._read(target[held:])

    def _take(self, count: int) -> memoryview:
        if self._begin == self._end:
            self._begin = self._end = 0
        elif len(self._buffer) - self._begin < count:
            held = self._end - self._begin
            self._buffer[:held] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, held
        while self._end - self._begin < count:
            # Short reads: rows behind an Append should land in their tensor, not here.
            room = max(_READ_BYTES, count - (self._end - self._begin))
            self._end += self._read(self._buffer[self._end : self._end + room])
        self._begin += count
        return self._buffer[self._begin - count : self._begin]

    def _read(self, target: memoryview) -> int:
        if self._deadline is not None:
            self._set_timeout(self._deadline - time.monotonic())
        try:
            got = self._socket.recv_into(target)
        except BlockingIOError:
            raise TimeoutError("the peer was silent past the deadline") from None
        if got == 0:
            raise ConnectionError(self.reason or "the peer closed the connection")
        return got

    def _set_timeout(self, seconds: float) -> None:
        # SO_RCVTIMEO instead of settimeout: one system call a read, and the socket stays blocking for nobody else.
        microseconds = max(int(seconds * 1e6), 1000)
        timeval = struct.pack("ll", *divmod(microseconds, 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)

    # Writing: by any thread.

    def send(self, *parts: Part, hold: bool = False) -> bool:
        """Queue parts and write what the kernel takes now. False if the connection is closed (or was, by this call).

        hold: wait for the next send, beat or HOLD_BYTES, so that the small parts of a step leave in one packet.
        Memory behind a memoryview is free for reuse on return: what has to wait is copied.
        """
        with self._lock:
            if self.reason is not None:
                return False
            size = sum(len(part) for part in parts)
            wait = self.blocked or (hold and self.queued_bytes + size < HOLD_BYTES)
            self._queue.extend([_owned(part) for part in parts] if wait else parts)
            self.queued_bytes += size
            if not wait:
                self._write()
            if self.queued_bytes > self._max_queued:
                self._overflow(self.queued_bytes)
            return self.reason is None

    def flush(self) -> None:
        """Write what waits, as far as the kernel takes it."""
        with self._lock:
            if self.reason is None and self._queue:
                self._write()

    def beat(self, frame: bytes, patience_s: float) -> None:
        """Send a heartbeat with whatever is held back; close if a full queue has not moved for `patience_s`."""
        with self._lock:
            if self.reason is not None:
                return
            if not self.blocked:
                self._queue.append(frame)
                self.queued_bytes += len(frame)
                self._write()
            elif time.monotonic() - self._progress > patience_s:
                self._close(f"the peer has read nothing for {patience_s} s")

    def close(self, reason: str) -> None:
        """End the connection: the reading thread gets a ConnectionError. Any thread, any number of times."""
        with self._lock:
            self._close(reason)

    def overflow(self, waiting: int) -> None:
        """Close because `waiting` bytes are more than may wait."""
        with self._lock:
            self._overflow(waiting)

    def release(self) -> None:
        """Free the socket. Only by the reading thread, as its last act."""
        with self._lock:
            self._close("released")
            self._released = True
            self._socket.close()

    def _write(self) -> None:
        self.blocked = False
        while self._queue:
            parts = [self._queue[i] for i in range(min(len(self._queue), _MAX_PARTS))]
            try:
                sent = self._socket.sendmsg(parts, (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._queue = deque(_owned(part) for part in self._queue)
                self.blocked = True
                self._on_blocked()
                return
            except OSError as error:
                self._close(f"writing failed: {error}")
                return
            self._progress = time.monotonic()
            self.sent_bytes += sent
            self.queued_bytes -= sent
            self._drop(sent)

    def _drop(self, sent: int) -> None:
        while self._queue and len(self._queue[0]) <= sent:
            sent -= len(self._queue.popleft())
        if sent:
            self._queue[0] = memoryview(self._queue[0])[sent:]

    def _overflow(self, waiting: int) -> None:
        self.overflowed = True
        self._close(f"{waiting} bytes wait for the peer, over the limit of {self._max_queued}")

    def _close(self, reason: str) -> None:
        if self.reason is not None:
            return
        self.reason = reason
        self._queue.clear()
        self.queued_bytes = 0
        self.blocked = False
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster


def _owned(part: Part) -> Part:
    """The same bytes in memory that nobody else changes."""
    borrowed = isinstance(part, memoryview) and not isinstance(part.obj, bytes)
    return bytes(part) if borrowed else part
