"""Shared prefixes are sent to a drafter once, whether their first owner is still running or over."""

from __future__ import annotations

import pytest

from cluster.link.messages import DraftAsk
from tests.verifier_service.test_engine import MODEL, Inbox, make_engine, request, running
from tests.verifier_service.test_linked import CheckedLink, linked
from verifier_service.proposers.sources import ClosedSources, Source, best_source

__all__ = ["running"]
PREFIX, OWN, OUTPUT, BLOCK_TOKENS = 24, 5, 16, 4


class WholeLink(CheckedLink):
    """Drafts are asked for with all that was committed."""

    def draft(self, ask: DraftAsk):
        assert sorted(self.contexts[ask.context_id]) == list(range(ask.base)), "a hole in the context"
        return super().draft(ask)


def talk(link: CheckedLink, running, names: list[str], together: bool, **limits) -> dict[str, float]:
    """Requests with one prefix, one after the other or at once after the first has begun."""
    engine = running(make_engine(proposer=linked(link), slots=8, blocks=200, **limits))
    inbox = Inbox()
    prompts = {name: request("in common", PREFIX).prompt_ids + request(name, OWN).prompt_ids for name in names}
    for name in names:
        engine.submit(request(name, output=OUTPUT, prompt_ids=prompts[name]), inbox)
        if not together:
            inbox.wait(name)
    inbox.wait(*names)
    for name in names:
        assert inbox.text(name) == MODEL.greedy(prompts[name], OUTPUT)
    counters = engine.status().counters
    engine.stop()
    assert counters["drafting_failures"] == 0, "what the link checks did not hold"
    return counters


@pytest.mark.parametrize("together", [False, True])
def test_a_prefix_in_common_is_sent_once(running, together):
    link, names = WholeLink(capacity=8), [f"r{i}" for i in range(4)]
    counters = talk(link, running, names, together)
    assert link.shared == counters["context_tokens_shared"] == 3 * PREFIX
    assert link.rows <= PREFIX + 4 * (OWN + OUTPUT)
    assert counters["accepted_tokens"] > 0.5 * counters["output_tokens"]


def test_what_the_drafter_has_no_more_is_sent(running):
    link, names = CheckedLink(capacity=8), [f"r{i}" for i in range(4)]
    link.forgetful = True
    counters = talk(link, running, names, together=False)
    assert link.shared == 0
    assert link.rows > 4 * PREFIX
    assert counters["accepted_tokens"] > 0.4 * counters["output_tokens"]


def source(name: str, first: int, end: int, *blocks: bytes) -> Source:
    return Source(name, first, end, 0, blocks)


def test_the_source_that_holds_most_before_the_end_is_taken():
    sources = [
        source("late", 6, 20, b"a", b"b", b"c"),
        source("early", 2, 20, b"a", b"b", b"c"),
        source("short", 0, 11, b"a", b"b", b"c"),
        source("other", 0, 20, b"a", b"b", b"x"),
        source("shorter", 0, 20, b"a", b"b"),
    ]
    assert best_source(sources, 2, b"c", 12, 4) == sources[1]
    assert best_source(sources, 2, b"c", 12, 11) is None
    assert best_source(sources, 1, b"b", 8, 4) == sources[2]
    assert best_source([], 1, b"b", 8, 4) is None


def test_the_last_contexts_that_were_closed_are_known_by_the_blocks_that_were_sent_whole():
    closed = ClosedSources()
    closed.begin(2)
    for name in ("one", "two", "three"):
        closed.add(source(name, 3, 13, b"a", b"b", b"c", b"d"), BLOCK_TOKENS)
    closed.add(source("nothing whole", 1, 7, b"a", b"b"), BLOCK_TOKENS)
    assert closed.all() == [Source(name, 3, 13, 1, (b"b", b"c")) for name in ("two", "three")]
    closed.drop("three")
    closed.drop("unknown")
    assert [each.context_id for each in closed.all()] == ["two"]
    closed.begin(0)
    closed.add(source("one", 0, 4, b"a"), BLOCK_TOKENS)
    assert closed.all() == []
