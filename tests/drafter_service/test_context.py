"""The context table against a plain model of it, and its ring against a dictionary."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.context import Context, ContextTable, Key

KEYS = [("link", name) for name in "abcd"]
APPENDS = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 40), st.integers(0, 25)), max_size=40)


def ring_rows(table: ContextTable, held: dict[int, dict[int, int]], key: Key, start: int, count: int) -> None:
    """Do to dictionaries (slot -> ring row -> position) what the pool does to tensors."""
    placement = table.append(key, start, count)
    context = placement.context
    ring = held.setdefault(context.slot, {})
    if placement.restarted:
        ring.clear()
    for position in range(placement.first, placement.first + placement.count):
        assert start + placement.skip <= position < start + count
        ring[(position - context.origin) % table.window] = position


def contexts(table: ContextTable) -> list[Context]:
    found = [table.get(key) for key in table.keys()]  # noqa: SIM118 - not a dict
    return [context for context in found if context is not None]


@settings(deadline=None)
@given(APPENDS, st.integers(1, 12), st.integers(1, 4))
def test_a_slot_holds_the_newest_window_of_its_context_in_its_first_rows(appends, window, slots):
    table = ContextTable(slots, window)
    held: dict[int, dict[int, int]] = {}
    for key, start, count in appends:
        ring_rows(table, held, key, start, count)
        for context in contexts(table):
            length = table.held(context)
            assert length == min(context.watermark - context.origin, window)
            assert sorted(held[context.slot]) == list(range(length))
            newest = set(range(context.watermark - length, context.watermark))
            assert set(held[context.slot].values()) == newest


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
        assert table.append(("link", f"new {i}"), 0, 1).evicted is None


def test_the_least_recently_used_context_gives_way():
    table = ContextTable(2, 8)
    table.append(("l", "a"), 0, 3)
    table.append(("l", "b"), 0, 3)
    table.get(("l", "a"))
    assert table.append(("l", "c"), 0, 3).evicted == ("l", "b")
    assert table.get(("l", "b")) is None
    table.append(("l", "a"), 3, 1)
    assert table.append(("l", "d"), 0, 3).evicted == ("l", "c")


def test_known_positions_are_skipped():
    table = ContextTable(1, 16)
    table.append(("l", "a"), 0, 5)
    again = table.append(("l", "a"), 2, 3)
    assert (again.count, again.context.watermark, again.restarted) == (0, 5, False)
    more = table.append(("l", "a"), 2, 5)
    assert (more.first, more.skip, more.count) == (5, 3, 2)


def test_a_gap_restarts_the_context_behind_it():
    table = ContextTable(1, 16)
    table.append(("l", "a"), 0, 5)
    placement = table.append(("l", "a"), 9, 4)
    assert placement.restarted
    assert (placement.first, placement.count) == (9, 4)
    assert table.held(placement.context) == 4


def test_of_a_long_append_only_the_window_is_written():
    placement = ContextTable(1, 8).append(("l", "a"), 0, 100)
    assert (placement.first, placement.skip, placement.count, placement.context.watermark) == (92, 92, 8, 100)


def test_an_append_long_after_the_ring_is_full_skips_what_it_could_not_keep():
    table = ContextTable(1, 8)
    table.append(("l", "a"), 0, 10)
    placement = table.append(("l", "a"), 5, 20)
    assert (placement.first, placement.skip, placement.count) == (17, 12, 8)


def test_an_append_from_before_the_origin_that_holds_all_the_rest_replaces_it():
    table = ContextTable(1, 64)
    table.append(("l", "a"), 100, 1)
    placement = table.append(("l", "a"), 60, 41)
    assert placement.restarted
    assert (placement.first, placement.skip, placement.count) == (60, 0, 41)
    assert (placement.context.origin, placement.context.watermark) == (60, 101)
    short = table.append(("l", "a"), 50, 20)
    assert (short.count, short.restarted) == (0, False), "what is held and newer is not given up"
