"""The link over mutual TLS: the same behaviour, nothing readable on the wire, nobody in without a certificate."""

from __future__ import annotations

import socket
import threading

import pytest
import torch

from cluster.errors import ConfigError
from cluster.link import candidates
from cluster.link.messages import DraftAsk
from cluster.tls import TlsFiles
from tests.cluster.certificates import tls_files
from tests.cluster.link.echo import HIDDEN, Echo, append, connect, eventually, serve

ASK = DraftAsk("v/r/0", 5, 7, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return tls_files(tmp_path_factory.mktemp("tls"))


class Tap:
    """Passes bytes between a verifier and a drafter, and keeps what went by."""

    def __init__(self, address: str):
        host, _, port = address.rpartition(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.seen = bytearray()
        threading.Thread(target=self._run, args=((host, int(port)),), daemon=True).start()

    def _run(self, target: tuple[str, int]) -> None:
        verifier, _ = self._listener.accept()
        drafter = socket.create_connection(target)
        for source, sink in ((verifier, drafter), (drafter, verifier)):
            threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.seen += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()  # the other direction has ended first

    def stop(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("encrypted", [False, True])
def test_drafts_and_features_pass_and_only_with_tls_unreadably(stops, files, encrypted):
    tls = files if encrypted else None
    handler = Echo()
    tap = stops(Tap(stops(serve(handler, tls=tls)).address))
    link = stops(connect(tap.address, tls=tls))
    eventually(lambda: link.state.linked)
    rows = torch.arange(4 * HIDDEN, dtype=torch.float32).reshape(4, HIDDEN)
    append(link, "a-telling-name/r/0", 0, rows)
    link.ask([ASK])
    assert link.collect([ASK], 5.0)[0].token_ids == (5, 6, 7)
    assert torch.equal(handler.rows("a-telling-name/r/0"), rows)
    assert (b"a-telling-name" in tap.seen) == (not encrypted)
    assert (rows.numpy().tobytes() in tap.seen) == (not encrypted)


def test_many_megabytes_arrive_whole_through_a_full_line(stops, files):
    handler = Echo()
    server = stops(serve(handler, tls=files))
    link = stops(connect(server.address, tls=files))
    eventually(lambda: link.state.linked)
    draw = torch.Generator().manual_seed(1)
    sent = [torch.randn(rows, HIDDEN, generator=draw) for rows in (1, 40_000, 7, 200_000, 3, 90_000)]
    start = 0
    for rows in sent:
        append(link, "v/r/0", start, rows)
        start += rows.shape[0]
    link.ask([ASK])
    assert len(link.collect([ASK], 20.0)) == 1
    assert torch.equal(handler.rows("v/r/0"), torch.cat(sent))
    assert link.state.epoch == 1


def test_appends_go_out_while_answers_come_in(stops, files):
    server = stops(serve(Echo(), tls=files))
    link = stops(connect(server.address, tls=files))
    eventually(lambda: link.state.linked)
    for base in range(1, 400):
        ask = DraftAsk("v/r/0", base, 7, 3)
        append(link, "v/r/0", base - 1, torch.ones(64, HIDDEN))
        link.ask([ask])
        assert len(link.collect([ask], 5.0)) == 1
    assert link.state.epoch == 1


def test_who_has_no_certificate_of_the_authority_is_not_let_in(stops, files, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(candidates, "BARRED_DELAY_S", 0.05)
    handler = Echo()
    server = stops(serve(handler, tls=files))
    for tls in (None, tls_files(tmp_path / "others")):
        stranger = stops(connect(server.address, tls=tls))
        eventually(lambda: stranger.counters["dial_failures"] >= 2)  # noqa: B023 (called at once)
        assert not stranger.state.linked
    assert handler.hellos == []
    assert "verifier.link.tls" in caplog.text
    known = stops(connect(server.address, tls=files))
    eventually(lambda: known.state.linked)


def test_a_verifier_with_tls_does_not_talk_to_a_drafter_without(stops, files, caplog):
    handler = Echo()
    link = stops(connect(stops(serve(handler)).address, tls=files))
    eventually(lambda: link.counters["dial_failures"])
    eventually(lambda: "verifier.link.tls" in caplog.text)
    assert handler.hellos == []


def test_files_that_cannot_be_used_are_named_at_once(files, tmp_path):
    missing = files.model_copy(update={"key": str(tmp_path / "nowhere.pem")})
    mixed = files.model_copy(update={"key": tls_files(tmp_path / "others").key})
    for broken in (missing, mixed):
        with pytest.raises(ConfigError, match=r"verifier\.link\.tls cannot be used"):
            connect(tls=broken)
        with pytest.raises(ConfigError, match=r"verifier\.link\.tls cannot be used"):
            serve(Echo(), tls=broken)
