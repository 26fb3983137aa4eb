"""Tensor planes: how the rows announced by Append frames reach the drafter. One pair of faces, one file a transport.

A plane lives as long as its epoch. Rows are [count, hidden] of the dtype that the Hello fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from cluster.errors import ProtocolError
from cluster.link.connection import Connection
from cluster.link.messages import MAX_ENTRIES, Append, FromDrafter, FromVerifier, Hello, Piece
from cluster.link.side_stream import SideStream
from cluster.wire import Codec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ROWS_BYTES = 16 << 20  # of one Append; longer ones are split by the sender
MAX_HIDDEN = 1 << 16


class RowSender(Protocol):
    """The verifier's end of a tensor plane."""

    queued_bytes: int
    sent_bytes: int

    def send(self, append: Append, rows: torch.Tensor) -> None:
        """Announce and send rows [count, hidden]; never blocks. A failure closes the connection."""

    def granted(self, size: int) -> None:
        """The peer gave credit for `size` bytes. Called by the reading thread only."""

    def close(self) -> None: ...


class RowReceiver(Protocol):
    """The drafter's end of a tensor plane."""

    def receive(self, append: Append) -> Iterator[tuple[Append, torch.Tensor]]:
        """The rows of `append`, and of Appends right behind it where the plane fetches several at once, in order.

        Raises ProtocolError for a header that cannot be, ConnectionError or TimeoutError if the rows do not come.
        """

    def close(self) -> None: ...


def row_bytes(hidden: int, dtype: torch.dtype) -> int:
    return hidden * dtype.itemsize


def check_append(append: Append, bytes_per_row: int) -> int:
    """Bytes of the rows. Raises ProtocolError for counts and positions outside their limits."""
    if not 0 < len(append.pieces) <= MAX_ENTRIES:
        raise ProtocolError(f"an append of {len(append.pieces)} pieces: there have to be 1..{MAX_ENTRIES}")
    for piece in append.pieces:
        if piece.count < 1:
            raise ProtocolError(f"count of a piece is {piece.count}: less than a row")
        if not 0 <= piece.start < 1 << 48:
            raise ProtocolError(f"start of a piece is {piece.start}: not a token position")
    size = sum(piece.count for piece in append.pieces) * bytes_per_row
    if size > MAX_ROWS_BYTES:
        raise ProtocolError(f"an append of {size} bytes of rows: more than {MAX_ROWS_BYTES}")
    return size


def appends(pieces: Sequence[Piece], most_rows: int) -> Iterator[Append]:
    """The pieces in frames of at most MAX_ENTRIES pieces and `most_rows` rows; a longer piece is cut."""
    if 0 < len(pieces) <= MAX_ENTRIES and sum(piece.count for piece in pieces) <= most_rows:
        yield Append(tuple(pieces))
        return
    batch: list[Piece] = []
    room = most_rows
    for piece in pieces:
        start, left = piece.start, piece.count
        while left > 0:
            count = min(left, room)
            batch.append(piece if count == piece.count else Piece(piece.context_id, start, count))
            start, left, room = start + count, left - count, room - count
            if not room or len(batch) == MAX_ENTRIES:
                yield Append(tuple(batch))
                batch, room = [], most_rows
    if batch:
        yield Append(tuple(batch))


def parted(pieces: Sequence[Piece], rows: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece with its own of the rows, which are not copied."""
    return zip(pieces, rows.split([piece.count for piece in pieces]))


class TcpSender:
    """Rows ride on the control connection, right behind their Append: one sendmsg, no copy on a free line."""

    def __init__(self, connection: Connection[FromDrafter], codec: Codec[FromDrafter], dtype: torch.dtype):
        self._connection = connection
        self._codec = codec
        self._dtype = dtype
        self.queued_bytes = 0  # all rows count as the connection's
        self.sent_bytes = 0

    def send(self, append: Append, rows: torch.Tensor) -> None:
        data = rows.detach().to("cpu", self._dtype).contiguous()
        array: Any = data.view(torch.uint8).numpy().reshape(-1)
        self._connection.send(self._codec.pack(append), memoryview(array), hold=True)

    def granted(self, size: int) -> None:
        raise ProtocolError(f"credit for {size} bytes on a tensor plane that needs none")

    def close(self) -> None:
        return


class TcpReceiver:
    """Reads rows straight into the memory of their tensor."""

    def __init__(self, connection: Connection[FromVerifier], hello: Hello, device: str):
        self._connection = connection
        self._hidden = hello.hidden
        self._dtype = DTYPES[hello.dtype]
        self._row_bytes = row_bytes(hello.hidden, self._dtype)
        self._device = torch.device(device)
        self._side = SideStream(self._device)

    def receive(self, append: Append) -> Iterator[tuple[Append, torch.Tensor]]:
        array: Any = np.empty(check_append(append, self._row_bytes), np.uint8)
        self._connection.receive_into(memoryview(array))
        rows = torch.frombuffer(array, dtype=self._dtype).view(-1, self._hidden)
        with self._side.here():
            rows = rows.to(self._device)
        self._side.hand_over(rows)
        yield append, rows

    def close(self) -> None:
        return
