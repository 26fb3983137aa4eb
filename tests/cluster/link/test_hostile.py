from __future__ import annotations

import random
import socket
import threading
import time

import msgspec
import pytest
import torch

from cluster.errors import LinkError
from cluster.handshake import HANDSHAKE, LINK, Accepted, Challenge, Dialler
from cluster.link.connection import MAX_CONTROL_BYTES
from cluster.link.drafter_end import MAX_STRANGERS
from cluster.link.messages import (
    MAX_ENTRIES,
    Ack,
    Append,
    Close,
    Draft,
    DraftAnswer,
    DraftAsk,
    Drafted,
    FromDrafter,
    FromVerifier,
    Heartbeat,
    Mark,
    Piece,
    Refused,
    Welcome,
)
from cluster.link.session import parse_address
from cluster.wire import Codec
from tests.cluster.link.echo import (
    HARD_DEADLINE_S,
    HELLO,
    HIDDEN,
    TOKEN,
    Echo,
    Verifier,
    append,
    connect,
    echoed,
    eventually,
    known,
    serve,
)

ASK = DraftAsk("v/r/0", 5, 7, 3)
CODEC: Codec[FromVerifier] = Codec(FromVerifier)
WELCOME = Welcome("fake", "version", 8, 64, 128)


def append_of(start: int, count: int) -> Append:
    return Append((Piece("v/r/0", start, count),))


class FakeDrafter:
    """Accepts verifiers one after the other and hands each socket to `behave(socket, hello)`."""

    def __init__(self, behave) -> None:
        self._behave = behave
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def greet(self, sock: socket.socket) -> None:
        known(sock)

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(5)
                try:
                    self.greet(sock)
                    self._behave(sock, CODEC.receive(sock))
                    while sock.recv(1 << 16):
                        pass
                except OSError:
                    continue

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()


def answers(link) -> bool:
    link.ask([ASK])
    return len(link.collect([ASK], 5.0)) == 1


@pytest.mark.parametrize("greeted", [False, True])
def test_random_bytes_to_a_drafter_leave_it_serving_others(stops, greeted):
    server = stops(serve(Echo()))
    link = stops(connect(server.address, verifier_id="honest"))
    eventually(lambda: link.state.linked)
    draw = random.Random(7)
    for round_ in range(60):
        if greeted:
            sock = Verifier(server.address, epoch=1 + round_).socket
        else:
            sock = socket.create_connection(parse_address(server.address), timeout=5)
        length = draw.choice([0, 1, 4, 40])
        prefix = length.to_bytes(4, "big") if draw.random() < 0.7 else b""
        with sock:
            sock.sendall(prefix + draw.randbytes(draw.randrange(1, 2000)))
    eventually(lambda: server.counters["protocol_errors"] >= 20 and len(server._connections) == 1)
    assert answers(link)
    assert link.state.epoch == 1


@pytest.mark.parametrize("greeted", [False, True])
def test_random_bytes_to_a_verifier_leave_it_linking_to_others(stops, greeted):
    draw = random.Random(7)

    def babble(sock, hello):
        length = draw.choice([0, 1, 4, 40])
        greeting = CODEC.pack(WELCOME) if greeted else b""
        sock.sendall(greeting + length.to_bytes(4, "big") + draw.randbytes(2000))

    fake = stops(FakeDrafter(babble))
    link = stops(connect(fake.address))
    counter = "epochs_ended" if greeted else "dial_failures"
    eventually(lambda: link.counters[counter] >= 5)
    link.set_drafters([stops(serve(Echo())).address])
    eventually(lambda: link.state.linked and link.state.drafter_id == "echo")
    assert answers(link)


@pytest.mark.parametrize(
    "message",
    [
        Append(()),
        append_of(0, 0),
        append_of(0, -1),
        append_of(0, 1 << 40),
        append_of(-1, 1),
        Append((Piece("v/r/0", 0, 2), Piece("v/s/0", 0, -1))),
        Append((Piece("v/r/0", 0, 1 << 62),) * 4),
        Append((Piece("v/r/0", 0, 1),) * (MAX_ENTRIES + 1)),
        HELLO,
    ],
)
def test_a_frame_that_cannot_be_ends_the_connection_that_sent_it(stops, message):
    handler = Echo()
    server = stops(serve(handler))
    verifier = Verifier(server.address)
    verifier.send(message)
    assert verifier.hears_the_end()
    eventually(lambda: handler.lost_peers)
    assert handler.features == {}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"protocol": 1}, "protocol is 1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"hidden": 0}, "hidden is 0"),
        ({"tensor_transport": "pigeon"}, "tensor_transport is 'pigeon'"),
        ({"tensor_transport": "torch", "store_port": 0}, "store_port is 0"),
    ],
)
def test_a_hello_that_cannot_be_served_is_refused_by_name(stops, changes, names):
    server = stops(serve(Echo()))
    verifier = Verifier(server.address, **changes)
    assert isinstance(verifier.welcome, Refused)
    assert names in verifier.welcome.reason
    assert verifier.hears_the_end()


def test_the_handlers_refusal_reaches_the_verifiers_log(stops, caplog):
    class Picky(Echo):
        def hello(self, hello):
            raise LinkError(f"hidden is {hello.hidden}, this drafter's is 4096")

    server = stops(serve(Picky()))
    link = stops(connect(server.address))
    eventually(lambda: link.counters["refused"])
    eventually(lambda: "hidden is 8, this drafter's is 4096" in caplog.text)


def test_a_hello_that_differs_from_the_claim_of_the_handshake_is_refused(stops):
    handler = Echo()
    server = stops(serve(handler))
    known_as = socket.create_connection(parse_address(server.address), timeout=5)
    dialler = Dialler(TOKEN, LINK, "v#1")
    known_as.sendall(HANDSHAKE.pack(dialler.respond(HANDSHAKE.receive(known_as))))
    dialler.conclude(HANDSHAKE.receive(known_as))
    known_as.sendall(CODEC.pack(msgspec.structs.replace(HELLO, epoch=2)))
    codec: Codec[FromDrafter] = Codec(FromDrafter)
    answer = codec.receive(known_as)
    known_as.close()
    assert isinstance(answer, Refused)
    assert "not those of the handshake" in answer.reason
    assert handler.hellos == []


def test_nothing_is_heard_of_a_verifier_before_it_is_known(stops):
    handler = Echo()
    server = stops(serve(handler))
    stranger = socket.create_connection(parse_address(server.address), timeout=5)
    stranger.sendall(CODEC.pack(HELLO) + CODEC.pack(append_of(0, 1)) + bytes(4 * HIDDEN))
    assert isinstance(HANDSHAKE.receive(stranger), Challenge)
    with pytest.raises(ConnectionError):
        HANDSHAKE.receive(stranger)
    stranger.close()
    assert (handler.hellos, handler.features) == ([], {})
    assert server.counters["protocol_errors"] == 1


def test_strangers_take_no_verifiers_place_and_the_oldest_of_too_many_give_way(stops):
    server = stops(serve(Echo(), max_links=2, hard_deadline_s=30.0))
    strangers = [socket.create_connection(parse_address(server.address), timeout=5) for _ in range(MAX_STRANGERS + 5)]
    assert all(strangers[i].recv(1 << 16) and not strangers[i].recv(1 << 16) for i in range(5))
    verifiers = [Verifier(server.address, verifier_id=name) for name in "ab"]
    assert [type(verifier.welcome) for verifier in verifiers] == [Welcome, Welcome]
    for stranger in strangers:
        stranger.close()
    for verifier in verifiers:
        verifier.close()


def test_a_drafter_that_proves_nothing_gets_no_hello(stops):
    heard: list[object] = []

    class Impostor(FakeDrafter):
        def greet(self, sock: socket.socket) -> None:
            sock.sendall(HANDSHAKE.pack(Challenge(1, LINK, bytes(32))))
            HANDSHAKE.receive(sock)
            sock.sendall(HANDSHAKE.pack(Accepted(bytes(32))))

    link = stops(connect(stops(Impostor(lambda sock, hello: heard.append(hello))).address))
    eventually(lambda: link.counters["refused"] == 1)
    assert heard == []


@pytest.mark.parametrize("method", ["hello", "linked", "append", "draft", "close_contexts"])
def test_a_failing_handler_costs_one_connection_and_not_the_server(stops, method):
    class Failing(Echo):
        pass

    def fail(self, *arguments):
        if "bad" in str(getattr(arguments[0], "hello", arguments[0])):
            raise ZeroDivisionError("a bug of the handler")
        return getattr(Echo, method)(self, *arguments)

    setattr(Failing, method, fail)
    server = stops(serve(Failing()))
    link = stops(connect(server.address, verifier_id="good"))
    eventually(lambda: link.state.linked)
    victim = socket.create_connection(parse_address(server.address), timeout=5)
    hello = msgspec.structs.replace(HELLO, verifier_id="bad")
    frames = [hello, Close(("v/r/0",)), Draft((ASK,)), append_of(0, 1)]
    victim.sendall(b"".join(CODEC.pack(frame) for frame in frames) + bytes(4 * HIDDEN))
    with victim:
        while True:
            try:
                if not victim.recv(1 << 16):
                    break
            except ConnectionError:
                break
    assert answers(link)


@pytest.mark.parametrize("telling", ["ack", "answer", "evicted"])
def test_context_ids_that_no_frame_holds_cost_their_verifier_its_connection_and_raise_nothing(stops, telling):
    handler = Echo()
    server = stops(serve(handler))
    verifier = Verifier(server.address)
    eventually(lambda: handler.peers)
    (peer,) = handler.peers
    longest = "x" * MAX_CONTROL_BYTES
    said = {"ack": [Mark(longest, 1)], "answer": [DraftAnswer(longest, 1, (), ())], "evicted": longest}
    getattr(peer, telling)(said[telling])
    assert verifier.hears_the_end()


def test_any_number_of_contexts_is_closed_at_once(stops):
    handler = Echo()
    link = stops(connect(stops(serve(handler)).address))
    eventually(lambda: link.state.linked)
    contexts = [f"v/{'r' * 256}{number}/0" for number in range(8 * MAX_ENTRIES)]
    link.close_contexts(contexts)
    eventually(lambda: len(handler.closed) == len(contexts))


def test_a_verifier_that_does_not_read_is_dropped_and_blocks_nobody(stops):
    handler = Echo()
    server = stops(serve(handler, max_queued_bytes=100_000))
    link = stops(connect(server.address, verifier_id="other"))
    eventually(lambda: link.state.linked)
    slow = Verifier(server.address, verifier_id="slow")
    eventually(lambda: len(handler.peers) == 2)
    peer = next(peer for peer in handler.peers if peer.hello.verifier_id == "slow")
    answer = DraftAnswer("slow/r/0", 1, tuple(range(1000)), (0.5,) * 1000)
    slowest = 0.0
    deadline = time.monotonic() + 10
    while not handler.lost_peers and time.monotonic() < deadline:
        started = time.monotonic()
        peer.answer([answer])
        slowest = max(slowest, time.monotonic() - started)
    assert handler.lost_peers == [peer]
    assert slowest < 0.5
    assert server.counters["queue_overflows"] == 1
    assert answers(link)
    assert link.state.epoch == 1
    slow.close()


def test_a_verifier_that_reads_nothing_for_the_hard_deadline_is_dropped_however_little_waits(stops):
    handler = Echo()
    server = stops(serve(handler, max_queued_bytes=1 << 30))
    slow = Verifier(server.address)
    eventually(lambda: handler.peers)
    peer = handler.peers[0]
    while not peer.connection.blocked:
        peer.answer([DraftAnswer("slow/r/0", 1, tuple(range(1000)), (0.5,) * 1000)])

    def beat_and_see():
        if not handler.lost_peers:
            slow.send(Heartbeat())
        return handler.lost_peers

    eventually(beat_and_see, within_s=5 * HARD_DEADLINE_S)
    assert "read nothing" in peer.connection.reason
    slow.close()


def test_a_drafter_that_does_not_read_ends_its_epoch_and_holds_nobody_up(stops):
    def greet(sock, hello):
        sock.sendall(CODEC.pack(WELCOME))
        released.wait(10)

    released = threading.Event()
    fake = stops(FakeDrafter(greet))
    link = stops(connect(fake.address, hidden=1024, max_queued_bytes=8 << 20, hard_deadline_s=5.0))
    eventually(lambda: link.state.linked)
    rows = torch.ones(256, 1024)
    slowest = 0.0
    for _ in range(40):
        started = time.monotonic()
        append(link, "v/r/0", 0, rows)
        slowest = max(slowest, time.monotonic() - started)
    eventually(lambda: link.counters["queue_overflows"])
    assert slowest < 0.5
    assert not link.state.linked or link.state.epoch > 1
    released.set()


def test_a_silent_peer_ends_the_handshake_on_either_side(stops):
    server = stops(serve(Echo()))
    mute = socket.create_connection(parse_address(server.address), timeout=5)
    HANDSHAKE.receive(mute)
    started = time.monotonic()
    for byte in (b"\0", b"\0", b"\1"):  # the deadline is for the whole hello, however it trickles in
        mute.sendall(byte)
        threading.Event().wait(HARD_DEADLINE_S / 4)
    assert mute.recv(1) == b""
    assert time.monotonic() - started < 3 * HARD_DEADLINE_S
    mute.close()

    fake = stops(FakeDrafter(lambda sock, hello: None))
    link = stops(connect(fake.address, server.address))
    eventually(lambda: link.state.drafter_id == "echo", within_s=5 * HARD_DEADLINE_S)


def test_late_duplicate_and_unknown_answers_are_dropped_and_counted(stops):
    handler = Echo()
    handler.answering = False
    server = stops(serve(handler))
    link = stops(connect(server.address))
    eventually(lambda: link.state.linked)
    newer = DraftAsk("v/r/0", 9, 7, 3)
    link.ask([ASK])
    link.ask([newer])
    eventually(lambda: len(handler.asks) == 2)
    handler.peers[0].answer([echoed(ASK), DraftAnswer("v/unknown/0", 9, (1,), (0.5,)), echoed(newer), echoed(newer)])
    assert link.collect([newer], 5.0) == [echoed(newer)]
    eventually(lambda: link.counters["duplicate"])
    counters = link.counters
    assert (counters["stale"], counters["unknown"], counters["duplicate"]) == (1, 1, 1)


@pytest.mark.parametrize("stray", [WELCOME, Refused("changed my mind")])
def test_a_greeting_in_the_middle_of_an_epoch_ends_it(stops, stray):
    fake = stops(FakeDrafter(lambda sock, hello: sock.sendall(CODEC.pack(WELCOME) + CODEC.pack(stray))))
    link = stops(connect(fake.address))
    eventually(lambda: link.counters["protocol_errors"] and link.state.epoch >= 2)


@pytest.mark.parametrize(
    "first",
    [Ack((Mark("v/r/0", 1),)), Drafted(()), Welcome("fake", "version", 0, 64, 128), Welcome("fake", "v", 8, 64, 0)],
)
def test_a_drafter_that_greets_wrongly_is_not_linked(stops, caplog, first):
    fake = stops(FakeDrafter(lambda sock, hello: sock.sendall(CODEC.pack(first))))
    link = stops(connect(fake.address))
    eventually(lambda: link.counters["dial_failures"])
    assert link.state.epoch == 0
    assert "frame" in caplog.text or "welcome" in caplog.text


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_credit_that_nobody_asked_for_ends_the_epoch(stops, transport):
    handler = Echo()
    server = stops(serve(handler))
    link = stops(connect(server.address, tensor_transport=transport))
    eventually(lambda: handler.peers)
    server._grant(handler.peers[0].connection, 64)
    eventually(lambda: link.counters["protocol_errors"] == 1)
    eventually(lambda: link.state.epoch == 2)
