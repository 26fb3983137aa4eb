"""The engine port under well-behaved, hostile and absent clients."""

from __future__ import annotations

import asyncio
import functools
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.api.engine_client import EngineClient
from cluster.contracts import (
    Abort,
    Configure,
    Delta,
    Deltas,
    EngineInfo,
    FromEngine,
    Probe,
    SamplingParams,
    SetDrafters,
    Status,
    Submit,
    ToEngine,
)
from cluster.errors import ConfigError, EngineDiedError, SecretError
from cluster.handshake import ENGINE, HANDSHAKE, Challenge, Dialler
from cluster.tls import Access
from cluster.wire import Codec
from tests.cluster.certificates import tls_files
from tests.verifier_service.fake_runner import FakeRunner
from tests.verifier_service.test_engine import WAIT_S, Guesser, expected, make_engine, request
from verifier_service import port as port_module
from verifier_service.model.face import ForwardOutput
from verifier_service.plan import StepPlan
from verifier_service.port import MAX_STRANGERS, EnginePort


class Client:
    """A blocking client of the port."""

    def __init__(self, address: str, secret: str = ""):
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=WAIT_S)
        self.codec: Codec[FromEngine] = Codec(FromEngine)
        dialler = Dialler(secret, ENGINE)
        self.socket.sendall(HANDSHAKE.pack(dialler.respond(HANDSHAKE.receive(self.socket))))
        dialler.conclude(HANDSHAKE.receive(self.socket))
        self.info = self.codec.receive(self.socket)
        self.deltas: list[Delta] = []

    def send(self, *messages) -> None:
        for message in messages:
            self.socket.sendall(self.codec.pack(message))

    def status(self, nonce: int = 1) -> Status:
        self.send(Probe(nonce))
        while True:
            message = self.codec.receive(self.socket)
            if isinstance(message, Status) and message.nonce == nonce:
                return message
            assert isinstance(message, Deltas)
            self.deltas += message.deltas

    def until(self, *names: str) -> None:
        while not set(names) <= {delta.request_id for delta in self.deltas if delta.finish}:
            message = self.codec.receive(self.socket)
            assert isinstance(message, Deltas)
            self.deltas += message.deltas

    def text(self, name: str) -> list[int]:
        return [token for delta in self.deltas if delta.request_id == name for token in delta.token_ids]

    def is_closed(self) -> bool:
        """Waits for the other end to close."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return True


class Slow(FakeRunner):
    """Steps take a millisecond, so that a test can act while a request runs."""

    def forward(self, plan: StepPlan) -> ForwardOutput:
        time.sleep(0.001)
        return super().forward(plan)


@pytest.fixture
def served() -> Iterator:
    """A function that serves an engine; everything is stopped at the test's end."""
    parts: list = []

    def serve(engine=None, **limits) -> EnginePort:
        engine = engine or make_engine(Slow(4, 200, 4, max_context=128), Guesser(0.5), blocks=200)
        port = EnginePort(engine, "127.0.0.1", **limits)
        engine.start()
        parts.append((engine, port))
        return port

    yield serve
    for engine, port in parts:
        engine.stop()
        port.stop()


def eventually(check: Callable[[], bool]) -> bool:
    until = time.monotonic() + WAIT_S
    while not check():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def test_the_engine_introduces_itself_first(served):
    client = Client(served().address)
    assert client.info == EngineInfo("e", "f", 128, 64, 4, 8)


def test_a_client_with_another_secret_learns_nothing_and_is_told_why(served, caplog):
    port = served(access=Access("the engine's"))
    with pytest.raises(SecretError, match=r"verifier\.link\.token"):
        Client(port.address, "a guess")
    assert eventually(lambda: "is not let in" in caplog.text)
    assert Client(port.address, "the engine's").status().running == 0


def test_over_tls_a_request_gets_its_text_and_a_client_without_a_certificate_nothing(served, tmp_path):
    files = tls_files(tmp_path)
    port = served(access=Access("s", files))

    async def text() -> list[int]:
        client = await EngineClient.connect(port.address, WAIT_S, Access("s", files))
        try:
            return [token async for delta in client.submit(request("a")) for token in delta.token_ids]
        finally:
            client.close()

    assert asyncio.run(text()) == expected("a")
    with pytest.raises(EngineDiedError):
        asyncio.run(EngineClient.connect(port.address, 0.5, Access("s")))


def test_nothing_is_taken_from_a_client_before_it_is_known(served):
    port = served()
    host, _, number = port.address.rpartition(":")
    stranger = socket.create_connection((host, int(number)), timeout=WAIT_S)
    stranger.sendall(Codec(ToEngine).pack(Submit(request("r"))))
    assert isinstance(HANDSHAKE.receive(stranger), Challenge)
    with pytest.raises(ConnectionError):
        HANDSHAKE.receive(stranger)
    stranger.close()
    assert Client(port.address).status().counters["steps"] == 0


def test_of_too_many_strangers_the_oldest_give_way_and_a_client_is_served(served):
    port = served()
    host, _, number = port.address.rpartition(":")
    strangers = [socket.create_connection((host, int(number)), timeout=WAIT_S) for _ in range(MAX_STRANGERS + 3)]
    for stranger in strangers:
        assert isinstance(HANDSHAKE.receive(stranger), Challenge)
    for stranger in strangers[:3]:
        with pytest.raises(ConnectionError):
            HANDSHAKE.receive(stranger)
    assert Client(port.address).status().running == 0
    for stranger in strangers:
        stranger.close()


def test_a_port_that_others_can_reach_needs_a_secret():
    with pytest.raises(ConfigError, match=r"verifier\.link\.token is empty"):
        EnginePort(make_engine(), "0.0.0.0")


def test_requests_of_many_connections_get_their_own_text(served):
    port = served()
    clients = [Client(port.address) for _ in range(3)]
    for number, client in enumerate(clients):
        client.send(*[Submit(request(f"c{number}r{i}", 3 + i, 20)) for i in range(4)])
    for number, client in enumerate(clients):
        names = [f"c{number}r{i}" for i in range(4)]
        client.until(*names)
        assert {delta.request_id for delta in client.deltas} == set(names)
        for i, name in enumerate(names):
            assert client.text(name) == expected(name, 3 + i, 20)


def test_a_step_is_one_message_per_connection(served):
    client = Client(served().address)
    client.send(*[Submit(request(f"r{i}", 3, 30)) for i in range(4)])
    together = 0
    while {delta.request_id for delta in client.deltas if delta.finish} != {f"r{i}" for i in range(4)}:
        message = client.codec.receive(client.socket)
        assert isinstance(message, Deltas)
        keys = [delta.request_id for delta in message.deltas]
        assert len(keys) == len(set(keys))
        together = max(together, len(keys))
        client.deltas += message.deltas
    assert together == 4


def test_an_abort_frees_the_request_and_is_answered(served):
    client = Client(served().address)
    client.send(Submit(request("a", output=100)), Abort("a", 0), Abort("unknown", 3))
    client.until("a")
    assert client.deltas[-1].finish == "abort"
    assert client.status().running == 0


def test_a_closed_connection_takes_its_requests_with_it(served):
    port = served()
    client, other = Client(port.address), Client(port.address)
    client.send(*[Submit(request(f"r{i}", output=100)) for i in range(4)])
    client.codec.receive(client.socket)
    client.socket.close()
    assert eventually(lambda: other.status().running == 0)
    status = other.status()
    assert status.free_blocks == status.total_blocks
    assert status.counters["finished_abort"] > 0


def test_a_client_cannot_abort_what_another_has_running(served):
    port = served()
    owner, other = Client(port.address), Client(port.address)
    owner.send(Submit(request("a", output=120)))
    owner.codec.receive(owner.socket)
    other.send(Abort("a", 0), Submit(request("a", output=120)))
    other.until("a")
    assert other.deltas[-1].error_kind == "request"
    other.socket.close()
    owner.until("a")
    assert owner.deltas[-1].finish == "length"


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack(">I", 1 << 31),
        struct.pack(">I", 0),
        struct.pack(">I", 5) + b"\xff\xfe\xfd\xfc\xfb",
        struct.pack(">I", 2) + b"\x80\x80",
        random.Random(1).randbytes(4096),
    ],
)
def test_malformed_bytes_close_their_connection_only(served, garbage):
    port = served()
    good, bad = Client(port.address), Client(port.address)
    good.send(Submit(request("good", output=60)))
    bad.send(Submit(request("bad", output=100)))
    bad.socket.sendall(garbage + b"\x00" * 64)
    assert bad.is_closed()
    good.until("good")
    assert good.text("good") == expected("good", output=60)
    assert eventually(lambda: good.status().running == 0)


def test_a_client_that_does_not_read_is_dropped(served):
    port = served(max_unread_bytes=1 << 16)
    deaf, other = Client(port.address), Client(port.address)
    # Small, so that little is unread in the kernel; but where it is tiny, the kernel drops what acknowledges probes.
    deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
    deaf.socket.settimeout(0.2)
    probes = b"".join(deaf.codec.pack(Probe(i)) for i in range(100))

    def is_dropped() -> bool:
        try:
            deaf.socket.sendall(probes)
        except TimeoutError:
            return False  # not yet: it waits until what it has sent is read
        except ConnectionError:
            return True
        return False

    assert eventually(is_dropped)
    assert other.status().running == 0


def test_a_step_too_long_for_one_frame_leaves_in_several(served, monkeypatch):
    longest = 900  # bytes: a Delta with 20 alternatives to its token has about 380
    monkeypatch.setattr(port_module, "Codec", functools.partial(Codec, max_bytes=longest))
    client = Client(served(make_engine(Slow(4, 200, 4, max_context=128), blocks=200)).address)
    wanted = [request(f"r{i}", 3, 20, sampling=SamplingParams(logprobs=20)) for i in range(4)]
    client.send(*map(Submit, wanted))
    client.codec = Codec(FromEngine, max_bytes=longest)
    sizes = []
    while sum(delta.finish is not None for delta in client.deltas) < 4:
        message = client.codec.receive(client.socket)
        assert isinstance(message, Deltas)
        sizes.append(len(message.deltas))
        client.deltas += message.deltas
    assert set(sizes) <= {1, 2}
    for each in wanted:
        assert client.text(each.request_id) == expected(each.request_id, 3, 20)


def test_settings_and_drafters_reach_the_proposer(served):
    told: list = []

    class Listening(Guesser):
        def configure(self, max_draft_tokens, soft_deadline_s):
            told.append((max_draft_tokens, soft_deadline_s))

        def set_drafters(self, addresses):
            told.append(addresses)

    client = Client(served(make_engine(proposer=Listening(1.0))).address)
    client.send(Configure(3, None), SetDrafters(("h:1", "h:2")))
    client.status()
    assert told == [(3, None), ("h:1", "h:2")]


def test_a_failed_engine_tells_its_clients_before_it_goes(served):
    class Broken(Slow):
        def forward(self, plan: StepPlan) -> ForwardOutput:
            if plan.step == 5:
                raise RuntimeError("a rank is gone")
            return super().forward(plan)

    engine = make_engine(Broken(4, 40, 4))
    port = EnginePort(engine, "127.0.0.1")
    client = Client(port.address)
    client.send(*[Submit(request(f"r{i}", output=100)) for i in range(3)])
    client.status()
    with pytest.raises(RuntimeError):
        engine.run()
    port.stop()
    client.until("r0", "r1", "r2")
    assert {delta.error_kind for delta in client.deltas if delta.finish} == {"engine"}
    assert client.is_closed()
