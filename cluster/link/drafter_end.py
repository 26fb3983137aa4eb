"""The drafter's end of its links: listens, admits verifiers, turns their frames into calls of one handler.

A thread a connection reads; answers are written by whoever has them and never wait: a verifier that does not read, or
sends what is no frame, loses its own connection, and the others notice nothing.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from cluster.errors import LinkError, PacelineError, ProtocolError, SecretError
from cluster.handshake import DENIED, HANDSHAKE, LINK, Listener, Session, check_secret
from cluster.link.connection import MAX_CONTROL_BYTES, Connection
from cluster.link.face import DrafterHandler
from cluster.link.messages import (
    PROTOCOL,
    Ack,
    Append,
    Close,
    Credit,
    Draft,
    DraftAnswer,
    Drafted,
    Evicted,
    FromDrafter,
    FromVerifier,
    Heartbeat,
    Hello,
    Mark,
    Refused,
    Share,
    Unshared,
    claim,
)
from cluster.link.planes import DTYPES, MAX_HIDDEN, RowReceiver, TcpReceiver, parted
from cluster.link.pump import Pump
from cluster.link.torch_plane import TorchMeeting, why_unavailable
from cluster.tls import TlsFiles, listener_context
from cluster.wire import Codec

log = logging.getLogger(__name__)

MAX_STRANGERS = 64  # connections that have proved nothing yet


class LinkedPeer:
    """One epoch of one verifier. Sends are dropped once the connection is closed.

    A verifier whose context ids are so long that no frame holds what is to be said of them loses its connection.
    """

    def __init__(self, hello: Hello, connection: Connection[FromVerifier], codec: Codec[FromVerifier]):
        self.hello = hello
        self.link_id = f"{hello.verifier_id}#{hello.epoch}@{id(connection):x}"
        self.connection = connection
        self._codec = codec

    def answer(self, answers: Sequence[DraftAnswer]) -> None:
        self._send(Drafted(tuple(answers)))

    def ack(self, marks: Sequence[Mark]) -> None:
        """Leaves with the next answer or heartbeat: nobody waits for it."""
        self._send(Ack(tuple(marks)), hold=True)

    def evicted(self, context_id: str) -> None:
        self._send(Evicted(context_id))

    def unshared(self, context_id: str) -> None:
        self._send(Unshared(context_id))

    def _send(self, message: FromDrafter, hold: bool = False) -> None:
        try:
            frame = self._codec.pack(message)
        except ProtocolError as error:
            self.connection.close(f"its context ids are too long: {error}")
        else:
            self.connection.send(frame, hold=hold)


class DrafterServer:
    """Serves a DrafterHandler on host:port (0 = any free one; see `address`). All times in seconds.

    load: the Heartbeat to send, called by a background thread every heartbeat_s. max_links: connections at once that
    know the secret; of others there are MAX_STRANGERS at most, and the oldest of them gives way. max_queued_bytes:
    answers that wait for one verifier to read them.
    token: the secret that verifiers have to know. Raises OSError if the port cannot be had, ConfigError for an empty
    token where other machines can reach it.
    """

    def __init__(
        self,
        handler: DrafterHandler,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "",
        tls: TlsFiles | None = None,
        heartbeat_s: float = 0.5,
        hard_deadline_s: float = 3.0,
        device: str = "cpu",
        load: Callable[[], Heartbeat] = Heartbeat,
        max_links: int = 256,
        max_queued_bytes: int = 4 << 20,
    ):
        check_secret(token, host, "drafter.token")
        self._handler = handler
        self._token = token
        self._tls = listener_context(tls)
        self._hard_deadline = hard_deadline_s
        self._device = device
        self._load = load
        self._max_links = max_links
        self._max_queued = max_queued_bytes
        self._codec: Codec[FromVerifier] = Codec(FromVerifier, MAX_CONTROL_BYTES)
        self._lock = threading.Lock()
        self._connections: dict[Connection[FromVerifier], threading.Thread] = {}
        self._strangers: dict[Connection[FromVerifier], None] = {}  # an ordered set, of _connections
        self._peers: dict[str, LinkedPeer] = {}
        self._stopping = False
        self.counters: Counter[str] = Counter(linked=0, lost=0, refused=0, protocol_errors=0, queue_overflows=0)
        self._listener = socket.create_server((host, port), family=_family(host), backlog=64)
        self.address = _address(self._listener)
        self._pump = Pump("drafter-pump", heartbeat_s, hard_deadline_s, self._beat)
        self._acceptor = threading.Thread(target=self._accept, name="drafter-accept", daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Close every link (the handler hears `lost` for each) and end all threads."""
        with self._lock:
            self._stopping = True
            connections = dict(self._connections)
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        except OSError as error:
            log.debug("the listener was down already: %s", error)
        for connection in connections:
            connection.close("the drafter stops")
        self._acceptor.join(self._hard_deadline)
        for thread in connections.values():
            thread.join(self._hard_deadline + 1)
        self._listener.close()
        self._pump.stop()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if not self._stopping:
                    log.warning("accepting a verifier failed: %s", error)
                    threading.Event().wait(0.05)  # out of file descriptors: let some go
                continue
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        connection: Connection[FromVerifier] = Connection(sock, self._codec, self._max_queued, self._pump.wake)
        thread = threading.Thread(target=self._serve, args=(connection,), name="drafter-reader", daemon=True)
        oldest = None
        with self._lock:
            if self._stopping:
                connection.release()
                return
            if len(self._strangers) >= MAX_STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
            self._connections[connection] = thread
            self._strangers[connection] = None
        if oldest is not None:
            oldest.close("too many connections that prove nothing")
        thread.start()

    def _beat(self) -> bytes:
        try:
            return self._codec.pack(self._load())
        except Exception:
            log.exception("the load callback failed; the heartbeat goes out without a load")
            return self._codec.pack(Heartbeat())

    # One connection, on its own thread.

    def _serve(self, connection: Connection[FromVerifier]) -> None:
        peer = None
        plane: RowReceiver | None = None
        try:
            connection.deadline_in(self._hard_deadline)
            peer, plane = self._welcome(connection)
            connection.silence_after(self._hard_deadline)
            self._pump.watch(connection)
            self.counters["linked"] += 1
            log.info("linked to verifier %s, epoch %d", peer.hello.verifier_id, peer.hello.epoch)
            self._handler.linked(peer)
            while True:
                self._take(peer, plane, connection.receive())
        except (OSError, PacelineError) as error:
            self._note(peer, connection, error)
        except Exception as error:
            log.exception("the drafter's handler failed; its link to this verifier ends")
            self._note(peer, connection, error)
        finally:
            self._leave(peer, plane, connection)

    def _welcome(self, connection: Connection[FromVerifier]) -> tuple[LinkedPeer, RowReceiver]:
        """Know the verifier, answer its hello. Raises SecretError after a Denied, LinkError after a Refused."""
        session = self._know(connection)
        full = self._settle(connection)
        hello = connection.receive()
        if not isinstance(hello, Hello):
            raise ProtocolError(f"the first frame is a {type(hello).__name__}, not a Hello")
        peer = LinkedPeer(hello, connection, self._codec)
        try:
            if full:
                raise LinkError(f"{self._max_links} verifiers are linked to this drafter, which is its limit")
            self._check(hello, session)
            welcome = self._handler.hello(hello)
            self._replace(peer)
        except LinkError as error:
            self.counters["refused"] += 1
            connection.send(self._codec.pack(Refused(str(error))))
            raise
        connection.send(self._codec.pack(welcome))
        if hello.tensor_transport == "tcp":
            return peer, TcpReceiver(connection, hello, self._device)
        meeting = TorchMeeting.join(
            connection.peer_host, connection.local_host, hello, session.key, self._hard_deadline, self._device
        )
        return peer, meeting.receiver(connection, lambda size: self._grant(connection, size))

    def _know(self, connection: Connection[FromVerifier]) -> Session:
        connection.start_tls(self._tls, server_side=True)
        listener = Listener(self._token, LINK)
        connection.send(HANDSHAKE.pack(listener.challenge))
        try:
            accepted, session = listener.check(connection.receive_as(HANDSHAKE))
        except SecretError:
            self.counters["refused"] += 1
            connection.send(HANDSHAKE.pack(DENIED))
            raise
        connection.send(HANDSHAKE.pack(accepted))
        return session

    def _settle(self, connection: Connection[FromVerifier]) -> bool:
        """No stranger any more; True if there are too many of its kind."""
        with self._lock:
            self._strangers.pop(connection, None)
            return len(self._connections) - len(self._strangers) > self._max_links

    def _grant(self, connection: Connection[FromVerifier], size: int) -> None:
        connection.send(self._codec.pack(Credit(size)))

    def _check(self, hello: Hello, session: Session) -> None:
        if hello.protocol != PROTOCOL:
            raise LinkError(f"protocol is {hello.protocol}, this drafter speaks {PROTOCOL}: upgrade the older end")
        if session.claim != claim(hello.verifier_id, hello.epoch):
            raise LinkError(f"verifier_id and epoch are not those of the handshake, {session.claim!r}")
        if hello.dtype not in DTYPES:
            raise LinkError(f"dtype is {hello.dtype!r}, this drafter takes {', '.join(DTYPES)}")
        if not 1 <= hello.hidden <= MAX_HIDDEN:
            raise LinkError(f"hidden is {hello.hidden}, not in 1..{MAX_HIDDEN}")
        if hello.tensor_transport not in ("tcp", "torch"):
            raise LinkError(f"tensor_transport is {hello.tensor_transport!r}, this drafter takes 'tcp' and 'torch'")
        if hello.tensor_transport == "torch" and (reason := why_unavailable(self._device)):
            raise LinkError(f"tensor_transport is 'torch', but at this drafter {reason}: use 'tcp'")
        if hello.tensor_transport == "torch" and not 0 < hello.store_port < 1 << 16:
            raise LinkError(f"store_port is {hello.store_port}: not a port")

    def _replace(self, peer: LinkedPeer) -> None:
        """A verifier has one link: a newer epoch ends the one it has outlived, an older one came too late."""
        with self._lock:
            earlier = self._peers.get(peer.hello.verifier_id)
            if earlier is not None and earlier.hello.epoch > peer.hello.epoch:
                raise LinkError(f"epoch is {peer.hello.epoch}, this verifier is linked in epoch {earlier.hello.epoch}")
            self._peers[peer.hello.verifier_id] = peer
        if earlier is not None:
            earlier.connection.close("the verifier came back with a new epoch")

    def _take(self, peer: LinkedPeer, plane: RowReceiver, message: FromVerifier) -> None:
        match message:
            case Append():
                for append, rows in plane.receive(message):
                    for piece, own in parted(append.pieces, rows):
                        self._handler.append(peer, piece.context_id, piece.start, own)
            case Share():
                self._handler.share(peer, message)
            case Draft():
                self._handler.draft(peer, message)
            case Close():
                self._handler.close_contexts(peer, message.context_ids)
            case Heartbeat():
                return
            case _:
                raise ProtocolError(f"a {type(message).__name__} in the middle of an epoch")

    def _note(self, peer: LinkedPeer | None, connection: Connection[FromVerifier], error: Exception) -> None:
        self.counters["protocol_errors"] += isinstance(error, ProtocolError)
        self.counters["queue_overflows"] += connection.overflowed
        if not self._stopping:
            who = f"verifier {peer.hello.verifier_id}, epoch {peer.hello.epoch}" if peer else "a connection"
            log.warning("%s ended: %s", who, connection.reason or error)

    def _leave(self, peer: LinkedPeer | None, plane: RowReceiver | None, connection: Connection[FromVerifier]) -> None:
        self._pump.forget(connection)
        connection.release()
        if plane is not None:
            plane.close()
        with self._lock:
            self._connections.pop(connection, None)
            self._strangers.pop(connection, None)
            # Not by `peer`: a hello may have got as far as the table and failed after.
            self._peers = {name: each for name, each in self._peers.items() if each.connection is not connection}
        if peer is not None and plane is not None:
            self.counters["lost"] += 1
            self._handler.lost(peer)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
