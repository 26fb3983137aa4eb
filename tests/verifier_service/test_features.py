"""The feature store against a plain dict: what it says it holds is what was put in, newest rows first to stay."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from verifier_service.feature_pages import PageTable, Parts
from verifier_service.features import FeatureStore

PAGE = 4
HIDDEN = 2
PAGE_BYTES = PAGE * HIDDEN * 4


def rows(start: int, count: int, mark: float = 0.0) -> torch.Tensor:
    positions = torch.arange(start, start + count, dtype=torch.float32)
    return torch.stack([positions, torch.full_like(positions, mark)], dim=1)


def made(pages: int) -> FeatureStore:
    return FeatureStore(pages * PAGE_BYTES, PAGE, HIDDEN)


def put(store: FeatureStore, key: str, start: int, given: torch.Tensor, window: int, names=()) -> PageTable:
    table = store.pages.of(key)
    parts = Parts()
    store.pages.put(table, start, len(given), window, names, parts)
    store.write(given, parts)
    return table


def read(store: FeatureStore, table: PageTable, start: int = 0, end: int = 1 << 30) -> tuple[int, list[float]]:
    first, held = store.read(table, start, end)
    return first, held[:, 0].tolist()


class Model:
    """Requests over a store, beside what each was ever given. Texts are chains of blocks, as their names say."""

    def __init__(self, seed: int, pages: int, window: int):
        self.random = random.Random(seed)
        self.store, self.limit, self.window = made(pages), pages * PAGE_BYTES, window
        self.texts: dict[str, tuple[float, ...]] = {}  # by request: what marks each of its blocks
        self.given: dict[str, dict[int, float]] = {}  # by request: mark of each position
        self.names: set[bytes] = set()

    def names_of(self, key: str) -> list[bytes]:
        text = self.texts[key]
        return [repr(text[: i + 1]).encode() for i in range(len(text))]

    def begin(self) -> None:
        """A new request; often its text begins as another's does, and it goes on after what is kept of that."""
        key = f"r{self.random.randrange(1 << 30)}"
        base = self.random.choice([*self.texts.values(), ()])
        shared = self.random.randint(0, len(base))
        self.texts[key] = (*base[:shared], *(float(self.random.randrange(99)) for _ in range(20 - shared)))
        self.given[key] = {}
        if self.random.random() < 0.8:
            blocks, wanted = self.random.randint(0, shared), self.random.randint(1, self.window)
            table = self.store.pages.of(key)
            if self.store.pages.adopt(table, self.names_of(key)[:blocks], wanted):
                assert table.end == blocks * PAGE
                assert table.end - table.first <= -(-wanted // PAGE) * PAGE
                self.note(key, table.first, table.end)

    def note(self, key: str, start: int, stop: int) -> None:
        self.given[key].update({at: self.texts[key][at // PAGE] for at in range(start, stop)})

    def grow(self) -> None:
        """Several requests in one write, as a step has them."""
        parts, data, count = Parts(), [], 0
        for key in self.random.sample(sorted(self.texts), min(len(self.texts), self.random.randint(1, 4))):
            table = self.store.pages.of(key)
            start = max(0, table.end + self.random.choice([0, 0, 0, 0, -3, 2]))
            stop = min(20 * PAGE, start + self.random.choice([1, 2, 3, 9]))
            if start >= stop:
                continue
            own = torch.cat([rows(at, 1, self.texts[key][at // PAGE]) for at in range(start, stop)])
            if start == table.end and stop - start < table.room and self.random.random() < 0.5:
                parts.add(count, table.extend(stop - start), stop - start)
            else:
                self.store.pages.put(table, start, stop - start, self.window, self.names_of(key), parts, count)
            self.names.update(self.names_of(key)[: stop // PAGE])
            self.note(key, start, stop)
            data.append(own)
            count += len(own)
        if data:
            self.store.write(torch.cat(data), parts)

    def end(self) -> None:
        if self.texts:
            key = self.random.choice(sorted(self.texts))
            self.store.pages.forget(key)
            del self.texts[key], self.given[key]

    def evict(self) -> None:
        self.store.pages.forget_names(self.random.sample(sorted(self.names), min(2, len(self.names))))

    def check(self) -> None:
        assert self.store.bytes + self.store.block_bytes <= self.limit
        for key, text in self.texts.items():
            table = self.store.pages.of(key)
            first, held = self.store.read(table, 0, 1 << 30)
            assert held[:, 0].tolist() == list(range(first, table.end)), "positions in order, without a hole"
            assert held[:, 1].tolist() == [text[at // PAGE] for at in range(first, table.end)], "another's rows"
            assert all(at in self.given[key] for at in range(first, table.end)), "rows that nobody gave"
            assert table.end - first < self.window + 2 * PAGE


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 30), st.integers(1, 40))
def test_what_is_held_is_what_was_put_in_whatever_is_shared_evicted_or_given_up(seed: int, pages: int, window: int):
    model = Model(seed, pages, window)
    for _ in range(60):
        model.random.choices([model.begin, model.grow, model.end, model.evict], [3, 12, 1, 1])[0]()
        model.check()
    while model.texts:
        model.end()
    assert model.store.bytes == 0
    model.store.pages.forget_names(model.names)
    assert model.store.block_bytes == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 9)), max_size=40))
def test_with_room_for_all_the_newest_window_is_there(window: int, puts: list[tuple[str, int]]):
    store = made(100)
    for key, count in puts:
        start = store.pages.of(key).end
        table = put(store, key, start, rows(start, count), window)
        first, held = read(store, table)
        assert first <= max(0, table.end - window)
        assert held == list(range(first, table.end))
        middle = (first + table.end) // 2
        assert read(store, table, middle) == (middle, list(range(middle, table.end)))
        assert read(store, table, first + 1, middle)[1] == list(range(first + 1, middle))


def test_all_bytes_together_are_the_settings():
    store = FeatureStore(10 * PAGE_BYTES + 7, PAGE, HIDDEN)
    assert store._rows.nbytes == 10 * PAGE_BYTES
    for i in range(30):
        put(store, f"r{i}", 0, rows(0, 9), 1000, [bytes([i, 0]), bytes([i, 1])])
        if i % 3:
            store.pages.forget(f"r{i}")
        assert store.bytes + store.block_bytes <= 10 * PAGE_BYTES


def test_a_bound_that_holds_no_block_is_an_error_that_names_the_setting():
    with pytest.raises(ConfigError, match=f"feature_store_bytes is {PAGE_BYTES - 1}.*4 tokens take {PAGE_BYTES}"):
        FeatureStore(PAGE_BYTES - 1, PAGE, HIDDEN)


def test_over_the_bound_the_longest_request_loses_its_older_half():
    store = made(25)
    long = put(store, "long", 0, rows(0, 80), 1000)
    short = put(store, "short", 0, rows(0, 30), 1000)
    assert read(store, short) == (0, list(range(30)))
    assert read(store, long) == (40, list(range(40, 80)))


def test_requests_come_before_blocks_that_none_holds():
    store = made(6)
    names = [b"0", b"1", b"2", b"3"]
    put(store, "writer", 0, rows(0, 16), 1000, names)
    store.pages.forget("writer")
    assert store.block_bytes == 4 * PAGE_BYTES
    whole = put(store, "other", 0, rows(0, 20), 1000)
    assert read(store, whole) == (0, list(range(20)))
    assert store.block_bytes == PAGE_BYTES
    reader = store.pages.of("reader")
    assert store.pages.adopt(reader, names[:1], 100), "the first block of a text is kept longest"
    assert read(store, reader) == (0, list(range(4)))


def test_positions_computed_again_are_skipped():
    store = made(100)
    put(store, "a", 0, rows(0, 10, mark=1.0), 100)
    table = put(store, "a", 4, rows(4, 10, mark=2.0), 100)
    assert read(store, table) == (0, list(range(14)))
    assert store.read(table, 0, 14)[1][:, 1].tolist() == [1.0] * 10 + [2.0] * 4


def test_a_gap_starts_afresh():
    store = made(100)
    put(store, "a", 0, rows(0, 10), 100)
    table = put(store, "a", 50, rows(50, 5), 100)
    assert read(store, table) == (50, list(range(50, 55)))
    assert store.bytes == 2 * PAGE_BYTES


def test_a_block_is_shared_and_not_copied():
    store = made(100)
    names = [b"0", b"1"]
    writer = put(store, "writer", 0, rows(0, 8), 100, names)
    readers = [store.pages.of(name) for name in "abc"]
    assert all(store.pages.adopt(reader, names, 100) for reader in readers)
    assert all(read(store, reader) == (0, list(range(8))) for reader in readers)
    assert store.bytes == 2 * PAGE_BYTES
    assert {tuple(table.pages) for table in (writer, *readers)} == {tuple(writer.pages)}


def test_a_block_whose_rows_are_gone_ends_what_is_given_back():
    store = made(100)
    names = [b"0", b"1", b"2", b"3"]
    put(store, "writer", 0, rows(0, 16), 100, names)
    store.pages.forget_names([b"1"])
    reader, other = store.pages.of("reader"), store.pages.of("other")
    assert store.pages.adopt(reader, names, 100)
    assert read(store, reader) == (8, list(range(8, 16)))
    assert not store.pages.adopt(other, names[:2], 100)


def test_a_block_that_began_in_the_middle_is_not_found():
    store = made(100)
    put(store, "writer", 2, rows(2, 6), 100, [b"0", b"1"])
    reader = store.pages.of("reader")
    assert not store.pages.adopt(reader, [b"0"], 100)
    assert store.pages.adopt(reader, [b"0", b"1"], 100)
    assert read(store, reader) == (4, list(range(4, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_in_the_dtype_of_the_store(dtype):
    store = FeatureStore(1 << 16, PAGE, 6, dtype)
    given = torch.randn(11, 6)
    table = put(store, "a", 0, given, 100)
    assert torch.equal(store.read(table, 0, 11)[1], given.to(dtype))


def test_what_was_read_stays_as_it_is_when_its_page_is_used_for_something_else():
    store = made(1)
    _, before = store.read(put(store, "a", 0, rows(0, 4, mark=1.0), 100), 0, 4)
    store.pages.forget("a")
    put(store, "b", 0, rows(0, 4, mark=2.0), 100)
    assert before[:, 1].tolist() == [1.0] * 4
