"""Length-prefixed msgpack frames: the one codec of the engine port and of the link's control plane.

A frame is a 4-byte big-endian length and that many bytes of msgpack. Nothing is pickled; a frame longer than the
receiver's limit, or bytes that are no member of the expected union, raise ProtocolError and nothing else.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, Generic, TypeVar

import msgspec

from cluster.errors import ProtocolError

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 16 << 20
T = TypeVar("T")


class Codec(Generic[T]):
    """Encode any struct; decode members of one union of tagged structs."""

    def __init__(self, union: Any, max_bytes: int = MAX_FRAME_BYTES):
        self.max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def pack(self, message: msgspec.Struct) -> bytes:
        """The frame, length included. Raises ProtocolError if it is over the limit."""
        body = self._encoder.encode(message)
        if len(body) > self.max_bytes:
            raise ProtocolError(f"a frame of {len(body)} bytes is over the limit of {self.max_bytes}")
        return LENGTH.pack(len(body)) + body

    def decode(self, body: bytes | bytearray | memoryview) -> T:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a frame of this protocol: {error}") from error

    def check_length(self, header: bytes | bytearray) -> int:
        (length,) = LENGTH.unpack(header)
        if not 0 < length <= self.max_bytes:
            raise ProtocolError(f"frame length {length} is not in 1..{self.max_bytes}")
        return length

    async def read(self, reader: asyncio.StreamReader) -> T:
        """Next message. Raises asyncio.IncompleteReadError when the peer is gone, ProtocolError on bad bytes."""
        length = self.check_length(await reader.readexactly(LENGTH.size))
        return self.decode(await reader.readexactly(length))

    def receive(self, connection: socket.socket) -> T:
        """Blocking twin of `read`: raises ConnectionError when the peer is gone, TimeoutError past its timeout."""
        length = self.check_length(receive_exactly(connection, LENGTH.size))
        return self.decode(receive_exactly(connection, length))


def receive_exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if got == 0:
            raise ConnectionError("the peer closed the connection")
        view = view[got:]
    return data
