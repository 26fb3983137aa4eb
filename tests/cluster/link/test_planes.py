from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.link.messages import MAX_ENTRIES, FromVerifier, Piece
from cluster.link.planes import MAX_ROWS_BYTES, appends, check_append, parted
from cluster.wire import Codec

CODEC: Codec[FromVerifier] = Codec(FromVerifier)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 99), st.integers(1, 30)), max_size=3 * MAX_ENTRIES),
    st.integers(1, 200),
)
def test_frames_hold_every_position_once_and_in_order_within_their_bounds(given: list[tuple], most: int):
    pieces = [Piece(*each) for each in given]
    frames = list(appends(pieces, most))
    for frame in frames:
        assert check_append(frame, MAX_ROWS_BYTES // most) <= MAX_ROWS_BYTES
    told = [
        (piece.context_id, piece.start + i) for frame in frames for piece in frame.pieces for i in range(piece.count)
    ]
    assert told == [(piece.context_id, piece.start + i) for piece in pieces for i in range(piece.count)]
    full = [frame for frame in frames[:-1] if len(frame.pieces) < MAX_ENTRIES]
    assert all(sum(piece.count for piece in frame.pieces) == most for frame in full), "a frame more than needed"


def test_a_full_frame_of_the_longest_context_ids_fits():
    longest = f"{'v' * 64}/{chr(0x1F600) * 256}/1000"
    (frame,) = appends([Piece(longest, 1 << 40, 1)] * MAX_ENTRIES, 1 << 20)
    packed = Codec(FromVerifier, 1 << 20).pack(frame)
    assert CODEC.decode(packed[4:]) == frame


def test_each_piece_gets_its_own_rows():
    rows = torch.arange(6.0).view(6, 1)
    given = parted([Piece("a", 3, 2), Piece("b", 0, 1), Piece("c", 9, 3)], rows)
    assert [(piece.context_id, own[:, 0].tolist()) for piece, own in given] == [
        ("a", [0, 1]),
        ("b", [2]),
        ("c", [3, 4, 5]),
    ]
