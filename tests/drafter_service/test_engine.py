"""The engine's drafts: appends, windows, batches, evictions and losses."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import asdict
from safetensors.torch import load_file

from cluster.link.messages import Draft, DraftAsk, Share
from drafter_service.engine import DrafterEngine
from tests.drafter_service import paper
from tests.drafter_service.pairs import BLOCK, MASK, VOCABULARY, settings_for
from tests.drafter_service.peers import CONTEXT, RecordingPeer, ask_for, assert_same, drafted_once, features


def test_an_ask_is_answered_with_as_many_tokens_as_rows(engine, peer):
    engine.append(peer, "a", 0, features(CONTEXT))
    for base, rows in enumerate(range(1, BLOCK), start=CONTEXT - BLOCK):
        answer = ask_for(engine, peer, "a", base, rows=rows)
        assert len(answer.token_ids) == len(answer.confidence) == rows
        assert all(0 <= token < VOCABULARY for token in answer.token_ids)
        assert all(1 / VOCABULARY <= confidence <= 1 for confidence in answer.confidence)


def test_the_load_counts_what_was_done(engine, peer):
    before = asdict(engine.load().totals)
    for index, name in enumerate("abcd"):  # one more than there is room for
        engine.append(peer, name, 0, features(CONTEXT, index))
    engine.append(peer, "b", CONTEXT - 4, features(6))
    engine.draft(peer, Draft((DraftAsk("b", CONTEXT + 2, 7, 3), DraftAsk("c", CONTEXT, 7, 2), DraftAsk("?", 5, 7, 2))))
    totals = engine.load().totals
    done = {name: value - before[name] for name, value in asdict(totals).items()}
    assert (done["asks"], done["empty"], done["steps"], done["drafts"], done["rows"]) == (3, 1, 1, 2, 7)
    assert done["appended_rows"] == 3 * CONTEXT + 2
    assert done["turned_away"] + done["evicted"] == 1
    assert done["busy_seconds"] > 0
    assert engine.load().totals == totals


def test_drafts_are_the_papers_most_probable_tokens(engine, peer, target_dir, drafter_dir):
    rows, weights = features(CONTEXT), load_file(target_dir / "model.safetensors")
    config = json.loads((drafter_dir / "config.json").read_text())
    block = weights["model.embed_tokens.weight"][[7, *[MASK] * (BLOCK - 1)]]
    hidden = paper.block_hidden(config, load_file(drafter_dir / "model.safetensors"), rows, 0, block, CONTEXT)
    probabilities = (hidden[1:] @ weights["lm_head.weight"].double().T).softmax(-1)
    confidence, token_ids = probabilities.max(-1)
    answer = drafted_once(engine, peer, rows)
    assert answer.token_ids == tuple(token_ids.tolist())
    assert answer.confidence == pytest.approx(confidence.tolist(), rel=1e-3)


def test_drafts_depend_on_the_context_and_on_the_bonus_token(engine, peer):
    first, second = (drafted_once(engine, peer, features(CONTEXT, seed)) for seed in (0, 1))
    assert first.confidence != pytest.approx(second.confidence, rel=1e-3)
    engine.append(peer, "a", 0, features(CONTEXT))
    other_bonus = ask_for(engine, peer, "a", CONTEXT, bonus=8)
    assert first.confidence != pytest.approx(other_bonus.confidence, rel=1e-3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, CONTEXT - 1), max_size=5), st.lists(st.integers(0, 6), min_size=6, max_size=6))
def test_appends_in_any_split_and_with_any_overlap_equal_one_append(engine, peer, cuts, overlaps):
    rows = features(CONTEXT)
    ends = sorted({*cuts, CONTEXT})
    for begin, end, overlap in zip([0, *ends], ends, overlaps):
        start = max(0, begin - overlap)
        engine.append(peer, "split", start, rows[start:end])
        if overlap % 2:
            engine.run_once()
    assert_same(ask_for(engine, peer, "split", CONTEXT), drafted_once(engine, peer, rows))
    engine.close_contexts(peer, ["split"])


def test_appending_again_changes_nothing(engine, peer):
    engine.append(peer, "a", 0, features(CONTEXT))
    engine.run_once()
    engine.append(peer, "a", 3, features(CONTEXT - 3, seed=9))  # positions that are known already
    assert_same(ask_for(engine, peer, "a", CONTEXT), drafted_once(engine, peer, features(CONTEXT)))


def test_after_a_gap_the_context_is_what_came_behind_it(engine, peer):
    rows = features(CONTEXT + 10)
    engine.append(peer, "a", 0, rows[:10])
    engine.append(peer, "a", 20, rows[20:])
    assert_same(ask_for(engine, peer, "a", CONTEXT + 10), drafted_once(engine, peer, rows[20:], start=20))


def test_a_context_beyond_the_window_drafts_from_its_window(target_dir, drafter_dir):
    rows = features(60)
    engine = DrafterEngine(settings_for(target_dir, drafter_dir, window=16), threaded=False)
    peer = RecordingPeer()
    engine.linked(peer)
    for start in range(0, 60, 5):
        engine.append(peer, "a", start, rows[start : start + 5])
        engine.run_once()
    assert_same(ask_for(engine, peer, "a", 60), drafted_once(engine, peer, rows[44:], start=44))


def test_every_pass_acknowledges_the_watermark_of_each_context_once(engine, peer):
    engine.append(peer, "a", 0, features(4))
    engine.append(peer, "a", 4, features(3))
    engine.append(peer, "b", 0, features(5))
    engine.run_once()
    assert peer.acks == [("a", 7), ("b", 5)]


def test_contexts_drafted_together_get_what_each_would_get_alone(engine, peer):
    sizes, rows = {"a": 5, "b": CONTEXT, "c": 11}, (BLOCK - 1, 2, 4)
    for seed, (name, size) in enumerate(sizes.items()):
        engine.append(peer, name, 0, features(size, seed))
    asks = [DraftAsk(name, size, 7, k) for (name, size), k in zip(sizes.items(), rows)]
    engine.draft(peer, Draft(tuple(asks)))
    (together,) = peer.frames
    for seed, (answer, ask) in enumerate(zip(together, asks)):
        engine.close_contexts(peer, [*sizes])
        engine.append(peer, "alone", 0, features(ask.base, seed))
        alone = ask_for(engine, peer, "alone", ask.base, rows=ask.rows)
        engine.close_contexts(peer, ["alone"])
        assert answer.context_id == ask.context_id
        assert_same(answer, alone)


def test_fewer_rows_are_a_forward_of_so_many_rows(engine, peer):
    """In a bidirectional block the masks behind a row take part in it: fewer rows are another forward, not a cut."""
    engine.append(peer, "a", 0, features(CONTEXT))
    few = ask_for(engine, peer, "a", CONTEXT, rows=2)
    engine.close_contexts(peer, ["a"])
    engine.append(peer, "a", 0, features(CONTEXT))
    many = ask_for(engine, peer, "a", CONTEXT, rows=BLOCK - 1)
    assert few.confidence != pytest.approx(many.confidence[:2], rel=1e-3)


def test_a_context_too_many_is_turned_away_with_one_notice_and_may_come_again(engine, peer):
    for name in "abcd":
        engine.append(peer, name, 0, features(CONTEXT))
    engine.append(peer, "d", CONTEXT, features(1))
    engine.run_once()
    assert [name for name, _ in peer.acks] == ["a", "b", "c"]
    assert peer.gone == ["d"]
    assert ask_for(engine, peer, "d", CONTEXT).token_ids == ()
    engine.close_contexts(peer, ["b", "d"])
    engine.append(peer, "d", 0, features(CONTEXT))
    for name in "acd":
        assert ask_for(engine, peer, name, CONTEXT).token_ids


def test_a_second_verifier_gets_its_share_of_a_full_drafter_with_notice_to_the_first(engine, peer):
    other = RecordingPeer("other")
    engine.linked(other)
    for name in "abc":
        engine.append(peer, name, 0, features(CONTEXT))
    ask_for(engine, peer, "a", CONTEXT - 1)
    for name in "xyz":
        engine.append(other, name, 0, features(CONTEXT))
    engine.run_once()
    assert (peer.gone, other.gone) == (["b"], ["y", "z"])
    assert ask_for(engine, other, "x", CONTEXT).token_ids
    for name in "ac":
        assert ask_for(engine, peer, name, CONTEXT).token_ids
    engine.lost(other)


def test_a_context_that_comes_newest_first_drafts_at_once_and_in_the_end_as_if_it_had_come_in_order(engine, peer):
    rows = features(CONTEXT)
    engine.append(peer, "a", CONTEXT - 6, rows[-6:])
    assert_same(ask_for(engine, peer, "a", CONTEXT), drafted_once(engine, peer, rows[-6:], CONTEXT - 6))
    more = features(3, seed=4)
    engine.append(peer, "a", 9, rows[9 : CONTEXT - 6])
    engine.append(peer, "a", CONTEXT, more)
    engine.append(peer, "a", 0, rows[:9])
    assert_same(ask_for(engine, peer, "a", CONTEXT + 3), drafted_once(engine, peer, torch.cat([rows, more])))


@pytest.mark.parametrize("closed", [False, True])
def test_a_context_that_shares_a_prefix_drafts_as_if_all_of_it_had_been_appended(engine, peer, closed):
    rows, own = features(CONTEXT), features(5, seed=9)
    engine.append(peer, "source", 0, rows)
    if closed:
        engine.close_contexts(peer, ["source"])
    engine.share(peer, Share("a", "source", 2, CONTEXT - 6))
    engine.append(peer, "a", CONTEXT - 4, own)
    shared = ask_for(engine, peer, "a", CONTEXT + 1)
    assert peer.not_shared == []
    assert_same(shared, drafted_once(engine, peer, torch.cat([rows[2 : CONTEXT - 4], own]), start=2))
    if not closed:
        assert_same(ask_for(engine, peer, "source", CONTEXT), drafted_once(engine, peer, rows))


def test_a_context_whose_source_is_gone_is_told_and_can_be_appended(engine, peer):
    rows = features(CONTEXT)
    engine.share(peer, Share("a", "unknown", 0, CONTEXT))
    assert ask_for(engine, peer, "a", CONTEXT - 1).token_ids == ()
    assert peer.not_shared == ["a"]
    engine.append(peer, "a", 0, rows)
    assert_same(ask_for(engine, peer, "a", CONTEXT), drafted_once(engine, peer, rows))


def test_a_lost_verifier_frees_its_contexts_and_nobody_elses(engine, peer):
    other = RecordingPeer("other")
    engine.linked(other)
    for name in "ab":
        engine.append(other, name, 0, features(CONTEXT))
    engine.append(peer, "mine", 0, features(CONTEXT))
    engine.lost(other)
    for name in "cd":
        engine.append(peer, name, 0, features(CONTEXT))
    engine.run_once()
    assert peer.gone == []
    assert ask_for(engine, peer, "mine", CONTEXT).token_ids
    assert other.frames == []


def test_contexts_of_two_verifiers_with_the_same_name_are_apart(engine, peer):
    other = RecordingPeer("other")
    engine.linked(other)
    engine.append(peer, "a", 0, features(CONTEXT, seed=1))
    engine.append(other, "a", 0, features(CONTEXT, seed=2))
    mine, theirs = ask_for(engine, peer, "a", CONTEXT), ask_for(engine, other, "a", CONTEXT)
    engine.lost(other)
    assert_same(mine, drafted_once(engine, peer, features(CONTEXT, seed=1)))
    assert_same(theirs, drafted_once(engine, peer, features(CONTEXT, seed=2)))


def test_an_ask_behind_the_watermark_does_not_see_what_came_after_it(engine, peer):
    rows = features(CONTEXT)
    engine.append(peer, "a", 0, rows)
    assert_same(ask_for(engine, peer, "a", CONTEXT - 4), drafted_once(engine, peer, rows[: CONTEXT - 4]))
