"""Both ends know each other before anything else is said, and nothing recorded elsewhere is worth anything."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError, ProtocolError, SecretError
from cluster.handshake import (
    ENGINE,
    HANDSHAKE,
    LINK,
    MAX_FRAME_BYTES,
    Accepted,
    Challenge,
    Denied,
    Dialler,
    Listener,
    Response,
    Session,
    admit,
    check_secret,
)

SECRET = "a long random secret"


def met(dialler: Dialler, listener: Listener) -> tuple[Session, Session]:
    accepted, theirs = listener.check(dialler.respond(listener.challenge))
    return dialler.conclude(accepted), theirs


def test_two_ends_with_one_secret_agree_on_a_claim_and_a_key_that_is_new_each_time():
    first, again = (met(Dialler(SECRET, LINK, "v#1"), Listener(SECRET, LINK)) for _ in range(2))
    assert first[0] == first[1]
    assert first[0].claim == "v#1"
    assert len(first[0].key) == 32
    assert first[0].key != again[0].key


@given(st.text(), st.text())
def test_a_dialler_with_another_secret_is_not_let_in(own, other):
    dialler, listener = Dialler(own, LINK), Listener(other, LINK)
    answer = dialler.respond(listener.challenge)
    if own == other:
        listener.check(answer)
        return
    with pytest.raises(SecretError, match=r"verifier\.link\.token"):
        listener.check(answer)


def test_a_listener_that_does_not_know_the_secret_is_not_believed():
    dialler, impostor = Dialler(SECRET, LINK), Listener("a guess", LINK)
    answer = dialler.respond(impostor.challenge)
    proof = impostor.check(Dialler("a guess", LINK).respond(impostor.challenge))[0].proof
    for claimed in (Accepted(proof), Accepted(answer.proof), Accepted(b"")):
        with pytest.raises(SecretError, match="does not know this application's secret"):
            dialler.conclude(claimed)
    with pytest.raises(SecretError, match=r"refuses this end's secret: .*verifier\.link\.token"):
        dialler.conclude(Denied("no"))


def test_a_recorded_answer_opens_no_other_connection():
    recorded = Dialler(SECRET, LINK, "v#1").respond(Listener(SECRET, LINK).challenge)
    with pytest.raises(SecretError):
        Listener(SECRET, LINK).check(recorded)


@pytest.mark.parametrize("change", [{"claim": "v#2"}, {"nonce": bytes(32)}, {"proof": bytes(32)}])
def test_an_answer_that_was_changed_proves_nothing(change):
    listener = Listener(SECRET, LINK)
    answer = Dialler(SECRET, LINK, "v#1").respond(listener.challenge)
    with pytest.raises(SecretError):
        listener.check(msgspec.structs.replace(answer, **change))


def test_a_listeners_own_proof_cannot_be_turned_back_at_it():
    """A stranger who dials and is dialled passes messages on, but has no proof in the other role."""
    listener, victim = Listener(SECRET, LINK), Listener(SECRET, LINK)
    accepted, _ = listener.check(Dialler(SECRET, LINK).respond(listener.challenge))
    with pytest.raises(SecretError):
        victim.check(Response(bytes(32), "", accepted.proof))


def test_an_answer_for_one_service_is_refused_by_the_other():
    port = Listener(SECRET, ENGINE)
    with pytest.raises(ProtocolError, match=r"'engine' port .* not a 'link' port"):
        Dialler(SECRET, LINK).respond(port.challenge)
    as_if_link = Challenge(port.challenge.version, LINK, port.challenge.nonce)
    with pytest.raises(SecretError):
        port.check(Dialler(SECRET, LINK).respond(as_if_link))


@pytest.mark.parametrize("message", [Challenge(1, LINK, b""), Accepted(b""), Denied("")])
def test_messages_out_of_turn_are_refused(message):
    with pytest.raises(ProtocolError):
        Listener(SECRET, LINK).check(message)
    if not isinstance(message, Challenge):
        with pytest.raises(ProtocolError):
            Dialler(SECRET, LINK).respond(message)


def test_neither_secret_nor_anything_long_is_in_a_frame():
    listener, dialler = Listener(SECRET, LINK), Dialler(SECRET, LINK, "v#1")
    answer = dialler.respond(listener.challenge)
    for message in (listener.challenge, answer, listener.check(answer)[0]):
        frame = HANDSHAKE.pack(message)
        assert SECRET.encode() not in frame
        assert len(frame) < 200
    with pytest.raises(ProtocolError, match="over the limit"):
        HANDSHAKE.pack(Denied("x" * MAX_FRAME_BYTES))


@pytest.mark.parametrize("said", [b"", b"\x00\x00\x00\x05\x81", (1 << 20).to_bytes(4, "big")])
def test_a_stranger_gets_a_deadline_and_a_short_frame(said):
    class Writer:
        def write(self, data: bytes) -> None:
            assert len(data) < 200

    async def meet() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(said)
        await admit(reader, Writer(), SECRET, ENGINE, 0.02)  # type: ignore[arg-type]

    with pytest.raises(ProtocolError if len(said) == 4 else TimeoutError):
        asyncio.run(meet())


@pytest.mark.parametrize(
    ("host", "open_to_others"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        ("localhost", False),
        ("10.0.0.5", True),
        ("0.0.0.0", True),
        ("node7", True),
    ],
)
def test_without_a_secret_there_is_loopback_only(host, open_to_others):
    check_secret("secret", host, "drafter.token")
    if not open_to_others:
        check_secret("", host, "drafter.token")
        return
    with pytest.raises(ConfigError, match=r"drafter\.token is empty"):
        check_secret("", host, "drafter.token")
