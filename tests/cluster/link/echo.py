"""A drafter that echoes: every draft is base, base + 1, ... As a program it is a drafter process to kill or stop."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from cluster.handshake import HANDSHAKE, LINK, Dialler, Listener
from cluster.link.drafter_end import DrafterServer
from cluster.link.face import Peer, VerifierLink
from cluster.link.messages import (
    PROTOCOL,
    Draft,
    DraftAnswer,
    DraftAsk,
    FromDrafter,
    Hello,
    Mark,
    Piece,
    Share,
    Welcome,
    claim,
)
from cluster.link.session import parse_address
from cluster.link.verifier_end import RemoteLink
from cluster.wire import Codec

TOKEN = "a shared secret"
HEARTBEAT_S = 0.1
HARD_DEADLINE_S = 0.6
HIDDEN = 8
HELLO = Hello(PROTOCOL, "v", 1, "target", "features", HIDDEN, 1000, "float32", "tcp")


class Echo:
    """Records what it hears. `answering` may be cleared to leave asks unanswered (they are kept in `asks`)."""

    def __init__(self, name: str = "echo") -> None:
        self.name = name
        self.answering = True
        self.hellos: list[Hello] = []
        self.peers: list[Any] = []  # LinkedPeer or LocalPeer
        self.lost_peers: list[Any] = []
        self.features: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self.asks: list[DraftAsk] = []
        self.order: list[str | Share] = []  # contexts appended to, and what is shared
        self.closed: list[str] = []

    def hello(self, hello: Hello) -> Welcome:
        self.hellos.append(hello)
        return Welcome(self.name, "version", block_size=8, capacity_contexts=64, window=128)

    def linked(self, peer: Peer) -> None:
        self.peers.append(peer)

    def append(self, peer: Peer, context_id: str, start: int, features: torch.Tensor) -> None:
        self.order.append(context_id)
        self.features.setdefault(context_id, []).append((start, features))
        peer.ack([Mark(context_id, start + len(features))])

    def share(self, peer: Peer, share: Share) -> None:
        self.order.append(share)
        peer.unshared(share.context_id)

    def draft(self, peer: Peer, draft: Draft) -> None:
        self.asks.extend(draft.asks)
        if self.answering:
            peer.answer([echoed(ask) for ask in draft.asks])

    def close_contexts(self, peer: Peer, context_ids: Sequence[str]) -> None:
        self.closed.extend(context_ids)

    def lost(self, peer: Peer) -> None:
        self.lost_peers.append(peer)

    def rows(self, context_id: str) -> torch.Tensor:
        """All features of a context, in the order of their arrival."""
        return torch.cat([features for _, features in self.features[context_id]])


def echoed(ask: DraftAsk) -> DraftAnswer:
    return DraftAnswer(ask.context_id, ask.base, tuple(ask.base + i for i in range(ask.rows)), (0.5,) * ask.rows)


def append(link: VerifierLink, context_id: str, start: int, features: torch.Tensor) -> None:
    """A piece by itself."""
    link.append([Piece(context_id, start, len(features))], features)


def serve(handler: Echo, **settings: object) -> DrafterServer:
    arguments: dict = {"token": TOKEN, "heartbeat_s": HEARTBEAT_S, "hard_deadline_s": HARD_DEADLINE_S} | settings
    return DrafterServer(handler, **arguments)


def connect(*addresses: str, **settings: object) -> RemoteLink:
    arguments: dict = {
        "verifier_id": "v",
        "target_fingerprint": "target",
        "feature_version": "features",
        "hidden": HIDDEN,
        "vocabulary": 1000,
        "token": TOKEN,
        "heartbeat_s": HEARTBEAT_S,
        "hard_deadline_s": HARD_DEADLINE_S,
    } | settings
    link = RemoteLink(**arguments)
    link.set_drafters(addresses)
    return link


class Verifier:
    """A verifier made by hand, frame by frame: it can be as wrong as a test needs it. welcome: the first answer."""

    def __init__(self, address: str, **changes: object) -> None:
        host, port = parse_address(address)
        self.socket = socket.create_connection((host, port), timeout=5)
        self.codec: Codec[FromDrafter] = Codec(FromDrafter)
        hello = msgspec.structs.replace(HELLO, **changes)
        dialler = Dialler(TOKEN, LINK, claim(hello.verifier_id, hello.epoch))
        self.send(dialler.respond(HANDSHAKE.receive(self.socket)))
        dialler.conclude(HANDSHAKE.receive(self.socket))
        self.send(hello)
        self.welcome = self.codec.receive(self.socket)

    def send(self, message: msgspec.Struct, rows: bytes = b"") -> None:
        self.socket.sendall(self.codec.pack(message) + rows)

    def hears_the_end(self) -> bool:
        """Reads on until the drafter closes the connection; TimeoutError if it does not."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        self.close()
        return True

    def close(self) -> None:
        self.socket.close()


def known(sock: socket.socket) -> None:
    """A drafter's half of the handshake."""
    listener = Listener(TOKEN, LINK)
    sock.sendall(HANDSHAKE.pack(listener.challenge))
    accepted, _ = listener.check(HANDSHAKE.receive(sock))
    sock.sendall(HANDSHAKE.pack(accepted))


def eventually(condition: Callable[[], object], within_s: float = 10.0) -> None:
    """Returns once the condition holds; fails past the deadline."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.001)


if __name__ == "__main__":
    server = serve(Echo(sys.argv[1]), hard_deadline_s=float(sys.argv[2]))
    print(server.address, flush=True)
    threading.Event().wait()
