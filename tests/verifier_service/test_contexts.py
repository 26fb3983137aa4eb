"""Whose features are sent: no more contexts than there is room for, none on top of a full queue; all are closed."""

from __future__ import annotations

from tests.verifier_service.test_engine import running
from tests.verifier_service.test_linked import CheckedLink, drive, linked

__all__ = ["running"]


def test_no_more_contexts_are_sent_than_the_drafter_has_room_for_and_the_next_takes_a_place_that_is_left(running):
    link = CheckedLink(capacity=2)
    counters = drive(link, linked(link), running)  # the link checks what it holds
    assert len({ask.context_id for ask in link.asked}) > 2
    assert counters["accepted_tokens"] > 0


def test_a_new_epoch_gives_its_places_to_the_oldest(running):
    link = CheckedLink(capacity=1)

    def event(call: int) -> None:
        if call == 4:
            link.begin_epoch()

    drive(link, linked(link), running, event, names=3)
    order = list(dict.fromkeys(ask.context_id for ask in link.asked))
    assert order[0] == "v/r0/0"
    assert order == sorted(order)


def test_fresh_features_wait_while_the_drafters_queue_is_full(running):
    link = CheckedLink()
    link.queued_bytes = 1 << 30
    counters = drive(link, linked(link), running, names=3)
    assert link.rows == 0
    assert counters["feature_bytes"] == 0


def test_a_context_of_which_the_drafter_holds_nothing_is_closed_as_well(running):
    link = CheckedLink()

    def event(call: int) -> None:
        if call == 3:
            link.queued_bytes = 1 << 30  # what is evicted now is not sent again
            for _ in range(4):
                link.evict()

    drive(link, linked(link), running, event, names=3)
    assert {ask.context_id for ask in link.asked} <= link.closed == {f"v/r{i}/0" for i in range(3)}
