"""The inbox lets each (link, context, base) through once and holds no more than its bounds."""

from __future__ import annotations

import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.link.messages import DraftAsk, Share
from drafter_service.inbox import Appended, Asked, Dropped, Inbox
from tests.drafter_service.peers import RecordingPeer


def ask(context_id: str, base: int) -> DraftAsk:
    return DraftAsk(context_id, base, bonus_token=1, rows=3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-2, 6)), max_size=40), st.integers(0, 5))
def test_nothing_is_let_through_twice_and_bases_only_grow(asks, room):
    inbox, peer = Inbox(max_asks=room), RecordingPeer()
    inbox.linked(peer)
    refused = [each for context, base in asks for each in inbox.draft(peer, [ask(context, base)])]
    taken = [event.ask for event in inbox.take() if isinstance(event, Asked)]
    assert len(taken) <= room
    out = [(each.context_id, each.base) for each in [*taken, *refused]]
    assert len(out) == len(set(out))
    for context in "abc":
        bases = [each.base for each in taken if each.context_id == context]
        assert bases == sorted(bases)
        assert not [b for b in bases if b in [each.base for each in refused if each.context_id == context]]


def test_asks_beyond_the_bound_are_refused_until_the_queue_is_taken():
    inbox, peer = Inbox(max_asks=2), RecordingPeer()
    assert inbox.draft(peer, [ask("a", 1), ask("b", 1), ask("c", 1)]) == [ask("c", 1)]
    assert inbox.asks == 2
    inbox.take()
    assert inbox.draft(peer, [ask("c", 2)]) == []
    assert inbox.counters["refused"] == 1


def test_shares_beyond_the_bound_are_refused_until_the_queue_is_taken():
    inbox, peer = Inbox(max_asks=2), RecordingPeer()
    assert [inbox.share(peer, Share(name, "a", 0, 4)) for name in "bcd"] == [True, True, False]
    assert len(inbox.take()) == 2
    assert inbox.share(peer, Share("d", "a", 0, 4))


def test_a_context_that_is_closed_may_begin_again():
    inbox, peer = Inbox(max_asks=9), RecordingPeer()
    inbox.draft(peer, [ask("a", 5)])
    inbox.draft(peer, [ask("a", 5), ask("a", 4)])
    assert inbox.counters["outdated"] == 2
    inbox.close_contexts(peer, ["a"])
    inbox.draft(peer, [ask("a", 4)])
    assert [event.ask.base for event in inbox.take() if isinstance(event, Asked)] == [5, 4]


def test_links_do_not_hide_each_others_asks():
    inbox, one, two = Inbox(max_asks=9), RecordingPeer("one"), RecordingPeer("two")
    inbox.draft(one, [ask("a", 5)])
    inbox.draft(two, [ask("a", 5)])
    assert len(inbox.take()) == 2


def test_features_beyond_the_bound_drop_their_context():
    inbox, peer = Inbox(max_asks=9, max_bytes=100), RecordingPeer()
    inbox.append(peer, "a", 0, torch.zeros(2, 10))
    inbox.append(peer, "a", 2, torch.zeros(1, 10))
    assert inbox.bytes == 80
    kinds = [(type(event), event.context_id) for event in inbox.take() if isinstance(event, Appended | Dropped)]
    assert kinds == [(Appended, "a"), (Dropped, "a")]
    assert inbox.bytes == 0


def test_shutting_wakes_who_waits():
    inbox = Inbox(max_asks=9)
    results: list[bool] = []
    waiter = threading.Thread(target=lambda: results.append(inbox.wait()))
    waiter.start()
    inbox.shut()
    waiter.join(10)
    assert results == [False]
