"""Whatever a verifier sends, the engine answers at most once, within its bounds, and never fails."""

from __future__ import annotations

import pytest
import torch

from cluster.errors import LinkError
from cluster.link.messages import PROTOCOL, Draft, DraftAnswer, DraftAsk, Hello
from drafter_service.engine import DrafterEngine
from tests.drafter_service.pairs import BLOCK, HIDDEN, VOCABULARY
from tests.drafter_service.peers import CONTEXT, ask_for, assert_same, drafted_once, features


@pytest.mark.parametrize(
    ("base", "bonus", "rows"),
    [
        (CONTEXT, 7, 0),
        (CONTEXT, 7, -3),
        (CONTEXT, 7, BLOCK),
        (CONTEXT, 7, 1 << 62),
        (CONTEXT, VOCABULARY, 2),
        (CONTEXT, -1, 2),
        (CONTEXT, 1 << 63, 2),
        (CONTEXT + 1, 7, 2),
        (0, 7, 2),
        (-5, 7, 2),
        (1 << 63, 7, 2),
    ],
)
def test_an_ask_that_cannot_be_drafted_is_answered_empty(engine, peer, base, bonus, rows):
    engine.append(peer, "a", 0, features(CONTEXT))
    answer = ask_for(engine, peer, "a", base, bonus, rows)
    assert answer == DraftAnswer("a", base, (), ())


def test_an_ask_for_an_unknown_or_closed_context_is_answered_empty(engine, peer):
    assert ask_for(engine, peer, "never seen", 5).token_ids == ()
    engine.append(peer, "a", 0, features(CONTEXT))
    engine.close_contexts(peer, ["a", "never seen either"])
    assert ask_for(engine, peer, "a", CONTEXT).token_ids == ()


@pytest.mark.parametrize(
    ("start", "rows"),
    [
        (-1, torch.zeros(2, HIDDEN)),
        (1 << 47, torch.zeros(2, HIDDEN)),
        (0, torch.zeros(2, HIDDEN + 1)),
        (0, torch.zeros(HIDDEN)),
    ],
)
def test_an_append_that_cannot_be_is_dropped_and_counted(engine, peer, start, rows):
    before = engine.counters["invalid"]
    engine.append(peer, "a", start, rows)
    assert ask_for(engine, peer, "a", max(start, 0) + 2).token_ids == ()
    assert engine.counters["invalid"] == before + 1


def test_features_that_are_no_numbers_spoil_no_other_context(engine, peer):
    good = drafted_once(engine, peer, features(CONTEXT))
    engine.append(peer, "bad", 0, torch.full((CONTEXT, HIDDEN), float("nan")))
    engine.append(peer, "good", 0, features(CONTEXT))
    engine.draft(peer, Draft(tuple(DraftAsk(name, CONTEXT, 7, BLOCK - 1) for name in ("bad", "good"))))
    assert_same(
        DraftAnswer("at once", *[getattr(peer.answers[-1], f) for f in ("base", "token_ids", "confidence")]), good
    )


def test_nothing_is_answered_twice(engine, peer):
    engine.append(peer, "a", 0, features(CONTEXT))
    ask = DraftAsk("a", CONTEXT, 7, 2)
    engine.draft(peer, Draft((ask, ask)))
    engine.draft(peer, Draft((ask,)))
    assert [(answer.base, len(answer.token_ids)) for answer in peer.answers] == [(CONTEXT, 2)]


def test_the_newest_ask_of_a_context_wins_and_the_older_is_answered_empty(engine, peer):
    engine.append(peer, "a", 0, features(CONTEXT))
    engine.draft(peer, Draft((DraftAsk("a", CONTEXT - 1, 7, 2), DraftAsk("a", CONTEXT, 7, 3))))
    assert [(answer.base, len(answer.token_ids)) for answer in peer.answers] == [(CONTEXT - 1, 0), (CONTEXT, 3)]


def test_asks_beyond_the_queue_are_answered_empty_at_once(engine, peer):
    engine.append(peer, "a", 0, features(CONTEXT))
    engine.draft(peer, Draft((*(DraftAsk(f"x{i}", 3, 7, 2) for i in range(8)), DraftAsk("a", CONTEXT, 7, 2))))
    assert peer.frames[0] == [DraftAnswer("a", CONTEXT, (), ())]
    assert len(peer.answers) == 9


def test_features_without_asks_are_applied_before_they_pile_up(engine, peer, monkeypatch):
    monkeypatch.setattr("drafter_service.engine.INLINE_BYTES", 10 * HIDDEN * 4)
    for start in range(0, 60, 6):
        engine.append(peer, "a", start, features(6))
    assert peer.acks


def hello(engine: DrafterEngine, **changes) -> Hello:
    fields = engine.identity | {"protocol": PROTOCOL} | changes
    return Hello(verifier_id="v", epoch=1, dtype="float32", tensor_transport="tcp", **fields)


def test_welcome_says_what_a_verifier_has_to_know(engine):
    welcome = engine.hello(hello(engine))
    assert (welcome.block_size, welcome.capacity_contexts, welcome.window) == (BLOCK, 3, 256)
    assert welcome.drafter_id == engine.drafter_id
    assert len(welcome.drafter_version) == 16


@pytest.mark.parametrize("field", ["protocol", "hidden", "vocabulary", "target_fingerprint", "feature_version"])
def test_a_hello_that_does_not_fit_is_refused_with_field_and_both_values(engine, field):
    own = hello(engine)
    value = 12345 if isinstance(getattr(own, field), int) else "of another"
    with pytest.raises(LinkError) as refusal:
        engine.hello(hello(engine, **{field: value}))
    for part in (field, repr(value), repr(getattr(own, field))):
        assert part in str(refusal.value)
