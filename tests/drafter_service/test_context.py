"""The context table against a plain model of it, and its rows against a dictionary."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.context import Context, ContextTable, Key, Placement

KEYS = [("link", name) for name in "abcd"]
APPENDS = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 40), st.integers(0, 25)), max_size=40)


def place(table: ContextTable, held: dict[int, dict[int, int]], key: Key, start: int, count: int) -> None:
    """Do to dictionaries (slot -> row -> position) what the pool does to tensors."""
    placement = table.append(key, start, count)
    if placement is None:
        assert key not in table
        return
    slot = held.setdefault(placement.context.slot, {})
    if placement.restarted:
        slot.clear()
    assert len(set(placement.rows)) == len(placement.rows)
    for position, row in enumerate(placement.rows, placement.first):
        assert start + placement.skip <= position < start + count
        slot[row] = position


def placed(table: ContextTable, key: Key, start: int, count: int) -> Placement:
    placement = table.append(key, start, count)
    assert placement is not None
    return placement


def contexts(table: ContextTable) -> list[Context]:
    found = [table.get(key) for key in table.keys()]  # noqa: SIM118 - not a dict
    return [context for context in found if context is not None]


@settings(deadline=None, max_examples=300)
@given(APPENDS, st.integers(1, 12), st.integers(1, 4))
def test_a_slot_holds_the_newest_window_of_its_context_in_its_first_rows(appends, window, slots):
    table = ContextTable(slots, window)
    held: dict[int, dict[int, int]] = {}
    for key, start, count in appends:
        place(table, held, key, start, count)
        for context in contexts(table):
            length = table.held(context)
            assert 0 <= length <= window
            assert sorted(held[context.slot]) == list(range(length))
            assert set(held[context.slot].values()) == set(range(context.lowest, context.watermark))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.lists(st.integers(1, 9), min_size=1), st.integers(0, 30))
def test_a_context_sent_newest_first_ends_as_one_sent_in_order(window, length, pieces, more):
    """more: tokens that are committed, one at a time, while the older ones come."""
    table = ContextTable(1, window)
    held: dict[int, dict[int, int]] = {}
    lowest, end = length, length
    sizes = itertools.cycle(pieces)
    first = True
    while lowest > 0 or more > 0:
        if lowest > 0:
            start = max(0, lowest - next(sizes))
            place(table, held, KEYS[0], start, (end if first else lowest) - start)
            lowest, first = start, False
        if more > 0:
            place(table, held, KEYS[0], end, 1)
            end, more = end + 1, more - 1
    assert sorted(held[0].values()) == list(range(max(0, end - window), end))


@settings(deadline=None)
@given(APPENDS, st.integers(1, 4))
def test_no_two_contexts_share_a_slot_and_no_slot_is_lost(appends, slots):
    table = ContextTable(slots, 8)
    for i, (key, start, count) in enumerate(appends):
        if i % 5 == 4:
            table.free(key)
        else:
            table.append(key, start, count)
        used = [context.slot for context in contexts(table)]
        assert len(used) == len(set(used)) <= slots
        assert set(used) <= set(range(slots))
    for key in KEYS:
        table.free(key)
    for i in range(slots):
        assert placed(table, ("link", f"new {i}"), 0, 1).evicted is None


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(2, 12), st.integers(1, 4))
def test_a_shared_context_holds_the_rows_of_its_source_and_every_slot_has_one_owner(data, window, slots):
    table = ContextTable(slots, window)
    held: dict[int, dict[int, int]] = {}
    for _ in range(30):
        key, source = data.draw(st.sampled_from(KEYS)), data.draw(st.sampled_from(KEYS))
        start, count = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 15))
        match data.draw(st.sampled_from(["append", "share", "share", "close", "free"])):
            case "append":
                place(table, held, key, start, count)
            case "share":
                share(table, held, key, source, start, count)
            case "close":
                table.close(key)
            case "free":
                table.free(key)
        for context in contexts(table):
            assert set(held[context.slot].values()) == set(range(context.lowest, context.watermark))
        assert len(table.keys()) == len(set(table.keys())) <= slots
    for key in KEYS:
        table.free(key)
    for i in range(slots):
        assert table.append(("link", f"new {i}"), 0, 1) is not None


def share(table: ContextTable, held: dict[int, dict[int, int]], key: Key, of: Key, start: int, count: int) -> None:
    was_open = key in table
    copied = table.share(key, of, start, count)
    if copied is None:
        assert (key in table) == was_open
        return
    assert not was_open
    assert copied.context.slot != copied.source.slot
    theirs = held[copied.source.slot]
    assert [theirs[row] for row in copied.sources] == list(range(start, start + count))
    held[copied.context.slot] = dict(zip(copied.rows, range(copied.first, start + count), strict=True))


def test_what_a_closed_context_held_is_shared_until_its_slot_is_needed():
    table = ContextTable(3, 8)
    for name in "abc":
        placed(table, ("l", name), 0, 6)
        table.close(("l", name))
    copied = table.share(("l", "d"), ("l", "a"), 0, 6)  # takes the slot of b, which was closed first of the others
    assert copied is not None
    assert table.share(("l", "e"), ("l", "b"), 0, 6) is None
    assert table.share(("l", "e"), ("l", "c"), 2, 3) is not None


def test_only_what_is_held_is_shared_and_only_with_a_new_context():
    table = ContextTable(4, 8)
    placed(table, ("l", "a"), 0, 12)  # 4..11 are held
    placed(table, ("l", "b"), 0, 3)
    assert table.share(("l", "c"), ("l", "a"), 3, 4) is None
    assert table.share(("l", "c"), ("l", "a"), 8, 5) is None
    assert table.share(("l", "c"), ("m", "a"), 4, 4) is None
    assert table.share(("l", "b"), ("l", "a"), 4, 4) is None
    assert table.share(("l", "a"), ("l", "a"), 4, 4) is None
    assert table.share(("l", "c"), ("l", "a"), 4, 0) is None
    assert table.share(("l", "c"), ("l", "a"), 4, 8) is not None


def test_a_link_alone_keeps_what_it_has():
    table = ContextTable(2, 8)
    placed(table, ("l", "a"), 0, 3)
    placed(table, ("l", "b"), 0, 3)
    assert table.append(("l", "c"), 0, 3) is None
    table.free(("l", "a"))
    assert placed(table, ("l", "c"), 0, 3).evicted is None


def test_another_link_gets_its_share_from_the_one_that_holds_most_its_least_recently_used_first():
    table = ContextTable(4, 8)
    for name in "abcd":
        placed(table, ("l", name), 0, 3)
    table.get(("l", "a"))
    assert placed(table, ("m", "a"), 0, 3).evicted == ("l", "b")
    assert placed(table, ("m", "b"), 0, 3).evicted == ("l", "c")
    assert table.append(("m", "c"), 0, 3) is None
    assert table.append(("l", "b"), 0, 3) is None
    assert placed(table, ("n", "a"), 0, 3).evicted is not None


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("lmn"), st.integers(0, 9)), max_size=80), st.integers(1, 6))
def test_links_that_all_want_more_settle_at_equal_shares_and_take_nothing_from_each_other(wishes, slots):
    table = ContextTable(slots, 8)
    for link, name in [*wishes, *[(link, name) for name in range(10) for link in "lmn"]]:
        table.append((link, str(name)), 0, 1)
    counts = [sum(key[0] == link for key in table.keys()) for link in "lmn"]  # noqa: SIM118 - not a dict
    assert sum(counts) == slots
    assert max(counts) - min(counts) <= 1
    held = set(table.keys())
    for link in "lmn":
        for name in range(10):
            table.append((link, str(name)), 0, 1)
    assert set(table.keys()) == held


def test_known_positions_are_skipped():
    table = ContextTable(1, 16)
    placed(table, ("l", "a"), 0, 5)
    again = placed(table, ("l", "a"), 2, 3)
    assert (len(again.rows), again.context.watermark, again.restarted) == (0, 5, False)
    more = placed(table, ("l", "a"), 2, 5)
    assert (more.first, more.skip, len(more.rows)) == (5, 3, 2)


def test_a_gap_restarts_the_context_behind_it():
    table = ContextTable(1, 16)
    placed(table, ("l", "a"), 0, 5)
    placement = placed(table, ("l", "a"), 9, 4)
    assert placement.restarted
    assert (placement.first, len(placement.rows)) == (9, 4)
    assert table.held(placement.context) == 4


def test_of_a_long_append_only_the_window_is_written():
    placement = placed(ContextTable(1, 8), ("l", "a"), 0, 100)
    assert (placement.first, placement.skip, len(placement.rows), placement.context.watermark) == (92, 92, 8, 100)


def test_an_append_long_after_the_ring_is_full_skips_what_it_could_not_keep():
    table = ContextTable(1, 8)
    placed(table, ("l", "a"), 0, 10)
    placement = placed(table, ("l", "a"), 5, 20)
    assert (placement.first, placement.skip, len(placement.rows)) == (17, 12, 8)


def test_an_append_from_before_the_origin_that_holds_all_the_rest_replaces_it():
    table = ContextTable(1, 64)
    placed(table, ("l", "a"), 100, 1)
    placement = placed(table, ("l", "a"), 60, 41)
    assert placement.restarted
    assert (placement.first, placement.skip, len(placement.rows)) == (60, 0, 41)
    assert (placement.context.lowest, placement.context.watermark) == (60, 101)


def test_rows_below_what_is_held_are_added_without_a_hole_and_within_the_window_only():
    table = ContextTable(1, 64)
    placed(table, ("l", "a"), 100, 10)
    older = placed(table, ("l", "a"), 80, 20)
    assert (older.restarted, older.first, older.skip, len(older.rows)) == (False, 80, 0, 20)
    apart = placed(table, ("l", "a"), 50, 20)
    assert (len(apart.rows), apart.restarted) == (0, False)
    oldest = placed(table, ("l", "a"), 30, 55)
    assert (oldest.first, oldest.skip, len(oldest.rows)) == (46, 16, 34)
    assert table.held(oldest.context) == 64
