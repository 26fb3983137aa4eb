"""How many contexts are tried with a drafter that serves others too."""

from __future__ import annotations

from verifier_service.proposers.room import FIRST_PAUSE_S, LAST_PAUSE_S, Room


def filled(room: Room, taken: int, now: float) -> int:
    """Places that are taken when as many are taken as may be."""
    while room.has_place(taken, now):
        taken += 1
        assert taken < 1000
    return taken


def test_a_drafter_that_turns_nothing_away_is_filled_to_its_capacity():
    room = Room()
    room.begin(7)
    assert filled(room, 0, 0.0) == 7


def test_after_a_refusal_nothing_more_is_tried_until_a_pause_is_over():
    room = Room()
    room.begin(7)
    room.turned_away(3, 10.0)
    assert filled(room, 3, 10.0 + 0.9 * FIRST_PAUSE_S) == 3
    assert filled(room, 2, 10.0) == 3, "a place that was left is taken at once"
    assert filled(room, 3, 10.0 + FIRST_PAUSE_S) == 4


def test_tries_that_stay_double_until_the_capacity_is_reached():
    room = Room()
    room.begin(40)
    room.turned_away(1, 0.0)
    now, taken, steps = 0.0, 1, []
    while taken < 40:
        now += FIRST_PAUSE_S
        before, taken = taken, filled(room, taken, now)
        steps.append(taken - before)
    assert steps == [1, 2, 4, 8, 16, 8]


def test_tries_that_fail_come_at_doubling_distances():
    room = Room()
    room.begin(0)
    room.turned_away(3, 0.0)
    now = 0.0
    tries: list[float] = []
    while len(tries) < 9:
        now += FIRST_PAUSE_S / 4
        if room.has_place(3, now):
            tries.append(now)
            room.turned_away(3, now)
    distances = [round(later - earlier) for earlier, later in zip([0.0, *tries], tries)]
    assert distances == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert LAST_PAUSE_S == 60


def test_another_drafter_is_filled_afresh():
    room = Room()
    room.begin(4)
    room.turned_away(1, 0.0)
    room.begin(5)
    assert filled(room, 0, 0.0) == 5
