"""The feature store gives back what was put in, newest rows first to stay, within its bytes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier_service.features import LOOSE, FeatureStore

ROW = 2 * 4  # bytes of a row


def rows(start: int, count: int) -> torch.Tensor:
    positions = torch.arange(start, start + count, dtype=torch.float32)
    return torch.stack([positions, -positions], dim=1)


def read(store: FeatureStore, key: str, start: int = 0, end: int = 1 << 30) -> tuple[int, list[int]]:
    first, pieces = store.between(key, start, end)
    return first, [int(row[0]) for piece in pieces for row in piece]


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(-6, 3), st.integers(1, 9)), max_size=3 * LOOSE),
    st.integers(4, 400),
)
def test_the_newest_window_is_there_and_bytes_are_bounded(window: int, puts: list[tuple[str, int, int]], limit: int):
    store = FeatureStore(limit * ROW, 4)
    for key, offset, count in puts:
        before = store.end(key)
        start = max(0, before + offset)
        store.put(key, start, rows(start, count), window)
        assert store.end(key) == max(before, start + count) or start > before
        first, held = read(store, key)
        assert held == list(range(first, store.end(key)))
        assert len(held) <= window
        assert store.bytes <= limit * ROW
        middle = (first + store.end(key)) // 2
        assert read(store, key, middle) == (middle, list(range(middle, store.end(key))))
        assert read(store, key, first + 1, middle)[1] == list(range(first + 1, middle))
    for key in "ab":
        store.forget(key)
    assert store.bytes == 0


def test_over_the_bound_the_longest_request_loses_its_oldest_rows():
    store = FeatureStore(100 * ROW, 4)
    store.put("long", 0, rows(0, 80), 1000)
    store.put("short", 0, rows(0, 30), 1000)
    assert read(store, "short") == (0, list(range(30)))
    first, held = read(store, "long")
    assert (first, held) == (40, list(range(40, 80)))


def test_positions_computed_again_are_skipped():
    store = FeatureStore(1 << 20, 4)
    store.put("a", 0, rows(0, 10), 100)
    store.put("a", 4, rows(4, 10), 100)
    assert read(store, "a") == (0, list(range(14)))
    assert store.bytes == 14 * ROW


def test_a_gap_starts_afresh():
    store = FeatureStore(1 << 20, 4)
    store.put("a", 0, rows(0, 10), 100)
    store.put("a", 50, rows(50, 5), 100)
    assert read(store, "a") == (50, list(range(50, 55)))
    assert store.bytes == 5 * ROW


def test_a_small_part_of_a_large_tensor_does_not_keep_it_alive():
    store = FeatureStore(1 << 20, 4)
    step = rows(0, 100)
    store.put("small", 0, step[:2], 100)
    store.put("large", 0, step, 100)
    (small,), (large,) = store.between("small", 0, 2)[1], store.between("large", 0, 100)[1]
    assert small.untyped_storage().nbytes() == 2 * ROW
    assert large.data_ptr() == step.data_ptr()
    assert read(store, "small") == (0, [0, 1])
