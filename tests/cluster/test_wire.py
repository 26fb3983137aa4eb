from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.contracts import Deltas, FromEngine, Probe, Submit, ToEngine
from cluster.errors import ProtocolError
from cluster.link.messages import Append, Draft, DraftAnswer, DraftAsk, Drafted, FromDrafter, FromVerifier, Piece
from cluster.wire import LENGTH, Codec

CODECS: list[Codec[Any]] = [Codec(union, 1 << 16) for union in (ToEngine, FromEngine, FromVerifier, FromDrafter)]
MESSAGES = (msgspec.Struct,)

# Text that UTF-8 cannot carry is no value of these fields.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
integers = st.integers(-(1 << 63), (1 << 63) - 1)
asks = st.builds(DraftAsk, text, integers, integers, integers)
answers = st.builds(
    DraftAnswer,
    text,
    integers,
    st.lists(integers, max_size=4).map(tuple),
    st.lists(st.floats(allow_nan=False), max_size=4).map(tuple),
)
from_verifier = st.one_of(
    st.builds(Append, st.lists(st.builds(Piece, text, integers, integers), max_size=4).map(tuple)),
    st.builds(Draft, st.lists(asks, max_size=4).map(tuple)),
)
from_drafter = st.builds(Drafted, st.lists(answers, max_size=4).map(tuple))


def decodes_or_refuses(codec: Codec[Any], data: bytes) -> None:
    try:
        message = codec.decode(data)
    except ProtocolError:
        return
    assert isinstance(message, MESSAGES)


@given(st.sampled_from(CODECS), st.binary(max_size=300))
@example(CODECS[0], b"")
@example(CODECS[0], b"\x91" * 5000)  # nested deeper than a parser's stack
@example(CODECS[0], b"\xdd\xff\xff\xff\xff")  # an array that claims 4 billion entries
@example(CODECS[0], b"\x81\xa4type\xa5probe\xa5nonce\xcf\xff\xff\xff\xff\xff\xff\xff\xff")
@example(CODECS[2], b"\x81\xa4type\xa4\xff\xfe\xfd\xfc")  # no UTF-8
def test_any_bytes_are_a_message_or_a_protocol_error(codec, data):
    decodes_or_refuses(codec, data)


@given(from_verifier, st.integers(0, 10_000), st.integers(0, 255))
def test_a_damaged_frame_is_a_message_or_a_protocol_error(message, position, value):
    body = bytearray(CODECS[2].pack(message)[LENGTH.size :])
    body[position % len(body)] = value
    decodes_or_refuses(CODECS[2], bytes(body))


@given(from_verifier, st.integers(0, 10_000))
def test_a_truncated_frame_is_a_protocol_error(message, cut):
    body = CODECS[2].pack(message)[LENGTH.size :]
    with pytest.raises(ProtocolError):
        CODECS[2].decode(body[: cut % len(body)])


@given(st.one_of(from_verifier.map(lambda m: (2, m)), from_drafter.map(lambda m: (3, m))))
def test_a_message_survives_the_wire(case):
    index, message = case
    frame = CODECS[index].pack(message)
    assert LENGTH.unpack(frame[: LENGTH.size]) == (len(frame) - LENGTH.size,)
    assert CODECS[index].decode(frame[LENGTH.size :]) == message


@given(st.binary(min_size=4, max_size=4))
def test_a_length_is_within_the_limit_or_a_protocol_error(header):
    codec = CODECS[0]
    try:
        assert 0 < codec.check_length(header) <= codec.max_bytes
    except ProtocolError:
        assert not 0 < struct.unpack(">I", header)[0] <= codec.max_bytes


def test_a_message_of_another_union_is_a_protocol_error():
    with pytest.raises(ProtocolError):
        CODECS[2].decode(CODECS[0].pack(Probe())[LENGTH.size :])


def test_a_frame_over_the_limit_is_not_packed():
    with pytest.raises(ProtocolError, match="over the limit of 65536"):
        CODECS[2].pack(Append((Piece("x" * (1 << 17), 0, 1),)))


@given(st.binary(max_size=64))
def test_a_socket_that_ends_anywhere_is_a_connection_or_protocol_error(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5)
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)

        def read_all() -> None:
            while True:
                assert isinstance(CODECS[1].receive(ours), MESSAGES)

        with pytest.raises((ConnectionError, ProtocolError)):
            read_all()


@given(st.binary(max_size=64))
def test_a_stream_that_ends_anywhere_is_an_incomplete_read_or_protocol_error(data):
    async def read_all() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        while True:
            assert isinstance(await CODECS[1].read(reader), MESSAGES)

    with pytest.raises((asyncio.IncompleteReadError, ProtocolError)):
        asyncio.run(read_all())


def test_both_readers_return_the_messages_in_order():
    frames = b"".join(CODECS[1].pack(message) for message in (Deltas(()), Deltas(())))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5)
        theirs.sendall(frames)
        assert [CODECS[1].receive(ours) for _ in range(2)] == [Deltas(()), Deltas(())]

    async def read_both() -> list[Any]:
        reader = asyncio.StreamReader()
        reader.feed_data(frames)
        return [await CODECS[1].read(reader) for _ in range(2)]

    assert asyncio.run(read_both()) == [Deltas(()), Deltas(())]


def test_a_silent_peer_is_a_timeout():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.02)
        theirs.sendall(b"\0\0")
        with pytest.raises(TimeoutError):
            CODECS[1].receive(ours)


def test_missing_fields_are_a_protocol_error_that_names_them():
    body = msgspec.msgpack.encode({"type": "submit"})
    with pytest.raises(ProtocolError, match="request"):
        CODECS[0].decode(body)
    assert Submit.__struct_fields__ == ("request",)
