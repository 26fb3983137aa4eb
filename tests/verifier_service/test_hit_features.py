"""After a prefix hit a draft context holds what it holds after a miss, from what is kept beside cached blocks."""

from __future__ import annotations

import pytest

from cluster.contracts import EngineRequest
from cluster.link.messages import DraftAnswer, DraftAsk
from tests.verifier_service.test_engine import MODEL, Inbox, make_engine, request, running
from tests.verifier_service.test_linked import CheckedLink, linked

__all__ = ["running"]
BLOCK_TOKENS = 4  # as make_engine has them
ROW = 2 * 4  # bytes of a row of the fake runner's taps


class NotingLink(CheckedLink):
    """What each context held when its first drafts were asked for."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.at_first: dict[str, list[int]] = {}

    def draft(self, ask: DraftAsk) -> DraftAnswer:
        self.at_first.setdefault(ask.context_id, sorted(self.contexts[ask.context_id]))
        return super().draft(ask)


def talk(running, link: CheckedLink, window: int = 4096, **limits) -> dict[str, float]:
    """A prompt; what continues its answer; what parts from it in the middle; it again. Then the counters."""
    engine = running(make_engine(proposer=linked(link, window=window), **limits))
    inbox = Inbox()
    first = request("first", 41).prompt_ids
    answer = tuple(MODEL.greedy(first, 22))
    prompts = {"first": first, "next": (*first, *answer, 1, 2), "parts": (*first[:22], 5, 6, 7), "again": first}
    for name, prompt in prompts.items():
        engine.submit(EngineRequest(name, prompt, seed=1, max_new_tokens=22), inbox)
        inbox.wait(name)
        assert inbox.text(name) == MODEL.greedy(prompt, 22)
    return engine.status().counters


@pytest.mark.parametrize("window", [9, 16, 30, 4096])
@pytest.mark.parametrize("step_tokens", [7, 64])
def test_a_context_after_a_hit_holds_the_window_that_it_holds_after_a_miss(running, window, step_tokens):
    held = []
    for prefix_cache in (False, True):
        link = NotingLink(window=window)
        counters = talk(running, link, step_tokens=step_tokens, prefix_cache=prefix_cache, blocks=80)
        assert (counters.get("prefix_hit_tokens", 0) > 0) == prefix_cache
        visible = window - 1  # the bonus token itself is the window's last
        held.append({name: positions[-visible:] for name, positions in link.at_first.items()})
    assert len(held[0]) == 4
    assert held[1] == held[0]


def test_features_go_with_their_blocks(running):
    counters = talk(running, CheckedLink(), blocks=24)
    assert counters["evicted_blocks"] > 0
    assert 0 < counters["block_feature_bytes"] <= counters["cached_blocks"] * BLOCK_TOKENS * ROW


def test_requests_in_flight_come_before_cached_blocks_in_the_stores_bytes(running):
    link = CheckedLink()
    engine = running(make_engine(proposer=linked(link, store_bytes=70 * ROW), blocks=80))
    inbox = Inbox()
    for name in "ab":
        engine.submit(request(name, 40, 22), inbox)
        inbox.wait(name)
    counters = engine.status().counters
    assert 0 < counters["block_feature_bytes"] <= 70 * ROW
