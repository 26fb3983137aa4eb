"""Shared prefixes are sent to a drafter once, whether their first owner is still running or over."""

from __future__ import annotations

import pytest
import torch

from cluster.contracts import EngineRequest
from cluster.link.messages import DraftAsk
from tests.verifier_service.test_engine import MODEL, Inbox, make_engine, request, running
from tests.verifier_service.test_linked import CheckedLink, TapFuser, linked
from verifier_service.features import FeatureStore
from verifier_service.proposers.contexts import Contexts
from verifier_service.proposers.sources import MOST, ClosedSources, Source, best_source
from verifier_service.sequence import Progress, RunningRequest

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


def test_a_drafter_that_claims_endless_room_does_not_make_closed_contexts_pile_up():
    closed = ClosedSources()
    closed.begin(1 << 60)
    for number in range(MOST + 2):
        closed.add(source(str(number), 0, 4, b"a"), BLOCK_TOKENS)
    assert len(closed.all()) == MOST


def test_a_request_that_comes_to_a_new_proposer_within_a_block_shares_nothing_of_that_block():
    """Another's first tokens are the same up to the block's beginning only."""
    link = CheckedLink(window=64, capacity=8)
    contexts = Contexts(link, TapFuser(), FeatureStore(1 << 14, BLOCK_TOKENS, 2), "v", 64)
    contexts.new_epoch(link.state)

    def step(name: str, start: int, tokens: list[int]) -> None:
        sequence = RunningRequest(EngineRequest(name, tuple(tokens), 1, 8), (0, 0))
        sequence.hashes = [bytes(tokens[: end + BLOCK_TOKENS]) for end in range(0, len(tokens) - 3, BLOCK_TOKENS)]
        progress = [Progress(sequence, 0, start, len(tokens) - start)]
        taps = torch.tensor([[at, token] for at, token in enumerate(tokens)][start:], dtype=torch.float32)
        contexts.take(contexts.of(progress), progress, taps, True)
        contexts.catch_up()

    step("one", 0, [1, 2, 3, 4, 5, 6, 7, 8])
    step("other", 6, [1, 2, 3, 4, 9, 9, 9, 9])
    assert link.shared == 0
    assert link.contexts["v/other/0"] == {6: 9, 7: 9}
