from __future__ import annotations

import threading
import time

import pytest

from cluster.link.answers import MAX_CONTEXT_ID, MAX_EVICTED, AnswerBook
from cluster.link.messages import DraftAnswer, DraftAsk
from tests.cluster.link.echo import echoed

ASK = DraftAsk("v/r/0", base=5, bonus_token=7, rows=3)


@pytest.fixture
def book():
    book = AnswerBook(vocabulary=100)
    book.begin(1)
    return book


def test_collect_returns_what_came_by_its_timeout(book):
    other = DraftAsk("v/s/0", 9, 7, 2)
    book.asked([ASK, other], 1)
    book.deliver([echoed(other)])
    started = time.monotonic()
    assert book.collect([ASK, other], 0.03) == [echoed(other)]
    assert 0.03 <= time.monotonic() - started < 1.0


def test_a_late_answer_is_kept_for_the_next_collect(book):
    book.asked([ASK], 1)
    assert book.collect([ASK], 0.0) == []
    book.deliver([echoed(ASK)])
    assert book.collect([ASK], 0.0) == [echoed(ASK)]


def test_an_answer_to_an_older_ask_is_stale(book):
    book.asked([ASK], 1)
    book.asked([DraftAsk("v/r/0", 8, 7, 3)], 1)
    book.deliver([echoed(ASK)])
    assert book.collect([ASK], 0.0) == []
    assert book.counters["stale"] == 1


def test_an_uncollected_answer_is_dropped_when_its_context_moves_on(book):
    book.asked([ASK], 1)
    book.deliver([echoed(ASK)])
    book.asked([DraftAsk("v/r/0", 8, 7, 3)], 1)
    assert book.collect([ASK], 0.0) == []


def test_a_second_answer_is_a_duplicate(book):
    book.asked([ASK], 1)
    book.deliver([echoed(ASK), DraftAnswer("v/r/0", 5, (1,), (0.1,))])
    assert book.collect([ASK], 0.0) == [echoed(ASK)]
    assert book.counters["duplicate"] == 1


def test_an_answer_of_a_context_that_never_asked_or_closed_is_unknown(book):
    book.asked([ASK], 1)
    book.close(["v/r/0", "v/never/0"])
    book.deliver([echoed(ASK), DraftAnswer("v/other/0", 5, (), ())])
    assert book.collect([ASK], 0.0) == []
    assert book.counters["unknown"] == 2


@pytest.mark.parametrize(
    ("ids", "confidence"),
    [
        ((1, 2, 3, 4), (0.5,) * 4),
        ((1, 2), (0.5,)),
        ((), (0.5,)),
        ((1, 100), (0.5, 0.5)),
        ((-1,), (0.5,)),
        ((1, 2), (0.5, float("nan"))),
        ((1,), (float("inf"),)),
        ((1,), (1.5,)),
        ((1,), (-0.5,)),
    ],
)
def test_an_answer_that_cannot_be_is_handed_out_empty(book, ids, confidence):
    book.asked([ASK], 1)
    book.deliver([DraftAnswer("v/r/0", 5, ids, confidence)])
    assert book.collect([ASK], 5.0) == [DraftAnswer("v/r/0", 5, (), ())]
    assert book.counters["invalid"] == 1


def test_no_drafts_is_a_valid_answer(book):
    book.asked([ASK], 1)
    book.deliver([DraftAnswer("v/r/0", 5, (), ())])
    assert len(book.collect([ASK], 5.0)) == 1
    assert book.counters["invalid"] == 0


@pytest.mark.parametrize("relink", [False, True])
def test_the_end_of_an_epoch_ends_the_wait(book, relink):
    book.asked([ASK], 1)

    def break_link():
        book.end()
        if relink:
            book.begin(2)

    breaker = threading.Timer(0.02, break_link)
    breaker.start()
    started = time.monotonic()
    assert book.collect([ASK], 30.0) == []
    assert time.monotonic() - started < 5.0
    breaker.join()


def test_asks_of_another_epoch_are_not_waited_for(book):
    book.asked([ASK], 2)
    started = time.monotonic()
    assert book.collect([ASK], 30.0) == []
    assert time.monotonic() - started < 5.0


def test_answers_to_asks_of_the_epoch_before_are_unknown(book):
    book.asked([ASK], 1)
    book.end()
    book.begin(2)
    book.deliver([echoed(ASK)])
    assert book.collect([ASK], 0.0) == []
    assert book.counters["unknown"] == 1


def test_evictions_are_taken_once(book):
    book.evict("v/r/0")
    assert book.take_evicted() == ["v/r/0"]
    assert book.take_evicted() == []


def test_a_drafter_gone_mad_fills_no_memory_with_evictions(book):
    for i in range(MAX_EVICTED + 5):
        book.evict("v/r/0")
        book.evict(f"v/{i}/0")
        book.evict("x" * (MAX_CONTEXT_ID + 1))
    evicted = book.take_evicted()
    assert len(evicted) == len(set(evicted)) == MAX_EVICTED
    assert max(map(len, evicted)) <= MAX_CONTEXT_ID
