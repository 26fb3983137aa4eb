"""One epoch as the verifier's end sees it, and how it begins: dial, hello, welcome, tensor plane."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from cluster.errors import LinkError, ProtocolError
from cluster.handshake import HANDSHAKE, LINK, check_dialled
from cluster.handshake import Dialler as Handshake
from cluster.link.connection import Connection
from cluster.link.messages import FromDrafter, Hello, Refused, Welcome, claim
from cluster.link.planes import DTYPES, RowSender, TcpSender
from cluster.link.torch_plane import TorchMeeting
from cluster.wire import Codec

_CONNECT_S = 2.0


class RefusedError(LinkError):
    """The drafter answered the hello with a reason not to serve it."""


@dataclass
class Session:
    """One epoch. Only `live` changes: in one reference the engine sees a consistent state without a lock."""

    epoch: int
    address: str
    connection: Connection[FromDrafter]
    plane: RowSender
    welcome: Welcome
    sent_before: int
    live: bool = True

    @property
    def sent_bytes(self) -> int:
        """Of both planes, with all epochs before."""
        return self.sent_before + self.connection.sent_bytes + self.plane.sent_bytes


class Dialler:
    """Begins sessions, one at a time, on the thread that will read them. Times in seconds, sizes in bytes."""

    def __init__(
        self,
        hello: Hello,
        token: str,
        tls: ssl.SSLContext | None,
        codec: Codec[FromDrafter],
        hard_deadline_s: float,
        device: str,
        max_queued: int,
        on_blocked: Callable[[], None],
    ):
        self._hello = hello
        self._token = token
        self._tls = tls
        self._codec = codec
        self._hard_deadline = hard_deadline_s
        self._device = device
        self._max_queued = max_queued
        self._on_blocked = on_blocked
        self._lock = threading.Lock()
        self._under_way: Connection[FromDrafter] | None = None
        self._stopped = False

    def dial(self, address: str, earlier: Session | None) -> Session:
        """The epoch after `earlier`. Raises OSError, LinkError, SecretError or ProtocolError, at the latest after the
        deadlines of connecting, hello and tensor plane."""
        host, port = parse_address(address)
        check_dialled(self._token, host)
        sock = socket.create_connection((host, port), timeout=min(self._hard_deadline, _CONNECT_S))
        connection = Connection(sock, self._codec, self._max_queued, self._on_blocked)
        try:
            self._begin(connection)
            epoch = earlier.epoch + 1 if earlier else 1
            welcome, plane = self._greet(connection, msgspec.structs.replace(self._hello, epoch=epoch))
            connection.silence_after(self._hard_deadline)
            return Session(epoch, address, connection, plane, welcome, earlier.sent_bytes if earlier else 0)
        except BaseException:
            connection.release()
            raise
        finally:
            with self._lock:
                self._under_way = None

    def stop(self) -> None:
        """Break off what is under way; every later dial fails."""
        with self._lock:
            self._stopped = True
            if self._under_way is not None:
                self._under_way.close("this end stops")

    def _begin(self, connection: Connection[FromDrafter]) -> None:
        with self._lock:
            if self._stopped:
                raise LinkError("this end stops")
            self._under_way = connection

    def _greet(self, connection: Connection[FromDrafter], hello: Hello) -> tuple[Welcome, RowSender]:
        connection.deadline_in(self._hard_deadline)
        connection.start_tls(self._tls, server_side=False)
        handshake = Handshake(self._token, LINK, claim(hello.verifier_id, hello.epoch))
        try:
            challenge = connection.receive_as(HANDSHAKE)
        except TimeoutError:
            raise LinkError("it does not answer; if its end has verifier.link.tls, this end has to as well") from None
        connection.send(HANDSHAKE.pack(handshake.respond(challenge)))
        key = handshake.conclude(connection.receive_as(HANDSHAKE)).key
        if hello.tensor_transport == "torch":
            meeting = TorchMeeting.host(connection.local_host, hello, key, self._hard_deadline, self._device)
            connection.send(self._codec.pack(meeting.hello))
            return _welcome(connection.receive()), meeting.sender(connection, self._codec, self._max_queued)
        connection.send(self._codec.pack(hello))
        return _welcome(connection.receive()), TcpSender(connection, self._codec, DTYPES[hello.dtype])


def _welcome(first: FromDrafter) -> Welcome:
    if isinstance(first, Refused):
        raise RefusedError(f"refused: {first.reason[:500]}")
    if not isinstance(first, Welcome):
        raise ProtocolError(f"the first frame is a {type(first).__name__}, not a Welcome")
    if first.block_size < 1 or first.window < 1:
        raise ProtocolError(f"welcome has block_size {first.block_size} and window {first.window}: both must be > 0")
    return first


def parse_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port". Raises LinkError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise LinkError(f"drafter address {address!r} is not host:port")
    return host.strip("[]"), int(port)
