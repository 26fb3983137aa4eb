"""The link proposer over a link in this process: what is sent, what is asked, and what bad answers can do (nothing)."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from cluster.contracts import SamplingParams
from cluster.link.face import LinkState
from cluster.link.messages import DraftAnswer, DraftAsk, DraftTotals, Heartbeat, Piece, Share
from cluster.link.planes import parted
from tests.verifier_service.test_engine import MODEL, Inbox, expected, make_engine, request, running
from verifier_service.control import PLAIN_FIRST, SpeculationControl
from verifier_service.features import FeatureStore
from verifier_service.proposers.linked import LinkProposer

__all__ = ["running"]
BLOCK = 8


class TapFuser:
    """Features are the fake runner's taps: (position, token)."""

    target_layer_ids = (0,)
    block_size = BLOCK

    def __call__(self, taps: torch.Tensor) -> torch.Tensor:
        return taps


class CheckedLink:
    """A VerifierLink that holds contexts as a drafter does, checks every message, and answers as `answer` says."""

    def __init__(self, right: float = 1.0, window: int = 64, capacity: int = 0):
        self._right, self._window, self._capacity = right, window, capacity
        self._random = random.Random(4)
        self._epoch = 1
        self._linked = True
        self._lost: list[str] = []
        self.contexts: dict[str, dict[int, int]] = {}
        self.asked: list[DraftAsk] = []
        self.answers: dict[tuple[str, int], DraftAnswer] = {}
        self.waits: list[float] = []
        self.closed: set[str] = set()
        self.silent = False
        self.queued_bytes = 0
        self.drafter_load = Heartbeat()
        self.rows = self.shared = 0
        self.over: dict[str, dict[int, int]] = {}  # what closed contexts held
        self.forgetful = False  # nothing can be shared
        self.not_shared: list[str] = []

    @property
    def state(self) -> LinkState:
        return LinkState(self._linked, self._epoch, "d", "v", BLOCK, self._window, self.rows * 8, self._capacity)

    def append(self, pieces: Sequence[Piece], features: torch.Tensor) -> None:
        assert features.shape[0] == sum(piece.count for piece in pieces)
        for piece, own in parted(pieces, features):
            self.hold(piece.context_id, piece.start, own)

    def hold(self, context_id: str, start: int, features: torch.Tensor) -> None:
        context = self.contexts.setdefault(context_id, {})
        assert not self._capacity or len(self.contexts) <= self._capacity, "more contexts than there is room for"
        assert not context or start <= max(context) + 1, "a gap"
        for position, (told, token) in enumerate(features.tolist(), start):
            assert position == told, "features of another position"
            assert position not in context, "sent twice in one epoch"
            context[position] = int(token)
        self.rows += features.shape[0]

    def share(self, share: Share) -> None:
        rows = {**self.over, **self.contexts}.get(share.source, {})
        wanted = range(share.start, share.start + share.count)
        assert share.context_id not in self.contexts, "only a new context shares"
        if not self.forgetful and all(position in rows for position in wanted):
            self.contexts[share.context_id] = {position: rows[position] for position in wanted}
            self.shared += share.count
        else:
            self.not_shared.append(share.context_id)

    def unshared(self) -> list[str]:
        lost, self.not_shared = self.not_shared, []
        for context_id in lost:
            self.contexts.pop(context_id, None)  # what came meanwhile is sent with the rest
        return lost

    def ask(self, asks: Sequence[DraftAsk]) -> None:
        for ask in asks:
            context = self.contexts[ask.context_id]
            assert max(context) == ask.base - 1, "features missing or ahead"
            assert 1 <= ask.rows <= BLOCK - 1
            self.asked.append(ask)
            if not self.silent:
                self.answers[ask.context_id, ask.base] = self.draft(ask)

    def draft(self, ask: DraftAsk) -> DraftAnswer:
        context = self.contexts[ask.context_id]
        tokens = [context.get(position, -1) for position in range(ask.base)] + [ask.bonus_token]
        guesses = MODEL.greedy(tokens, ask.rows)
        ids = tuple(g if self._random.random() < self._right else (g + 1) % 64 for g in guesses)
        return DraftAnswer(ask.context_id, ask.base, ids, (0.5,) * len(ids))

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        self.waits.append(timeout_s)
        keys = [(ask.context_id, ask.base) for ask in asks]
        return [self.answers.pop(key) for key in keys if key in self.answers]

    def close_contexts(self, context_ids: Sequence[str]) -> None:
        self.closed.update(context_ids)
        for context_id in context_ids:
            self.over[context_id] = self.contexts.pop(context_id, {})

    def evicted(self) -> list[str]:
        lost, self._lost = self._lost, []
        return lost

    def set_drafters(self, addresses: Sequence[str]) -> None:
        """The drafter is this object."""

    def stop(self) -> None:
        self._linked = False

    # What happens to a link.

    def begin_epoch(self) -> None:
        self.contexts.clear()
        self.over.clear()
        self.answers.clear()
        self._epoch += 1
        self._linked = True

    def end_epoch(self) -> None:
        self.contexts.clear()
        self.answers.clear()
        self._linked = False

    def evict(self) -> None:
        for context_id in list(self.contexts)[:2]:
            del self.contexts[context_id]
            self.answers = {key: answer for key, answer in self.answers.items() if key[0] != context_id}
            self._lost.append(context_id)


def linked(link: CheckedLink, **changes) -> LinkProposer:
    store = FeatureStore(changes.pop("store_bytes", 1 << 20), 4, 2)
    fuser = changes.pop("fuser", TapFuser())
    settings = {"verifier_id": "v", "max_draft_tokens": None, "soft_deadline_s": 0.01, **changes}
    return LinkProposer(link, fuser, store, **settings)


def drive(link: CheckedLink, proposer: LinkProposer, running, event=None, names=8, **limits) -> dict[str, float]:
    """Run requests to their end; `event(collect number)` may do things to the link, between steps."""
    calls = 0
    plain_collect = link.collect

    def collect(asks, timeout_s):
        nonlocal calls
        answers = plain_collect(asks, timeout_s)
        calls += 1
        if event is not None:
            event(calls)
        return answers

    link.collect = collect  # type: ignore[method-assign]
    engine = running(make_engine(proposer=proposer, **limits))
    inbox = Inbox()
    everyone = [f"r{i}" for i in range(names)]
    for i, name in enumerate(everyone):
        engine.submit(request(name, 1 + 3 * i, 24), inbox)
    inbox.wait(*everyone)
    for i, name in enumerate(everyone):
        assert inbox.text(name) == expected(name, 1 + 3 * i, 24)
    counters = engine.status().counters
    engine.stop()
    assert counters["drafting_failures"] == 0, "what the link checks did not hold"
    return counters


def at(happen: Callable[[], None], *calls: int) -> Callable[[int], None]:
    """An event of `drive` that happens after these collects."""

    def event(call: int) -> None:
        if call in calls:
            happen()

    return event


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("blocks", [80, 14])
def test_each_committed_tokens_features_are_sent_once_and_text_is_unchanged(running, right, blocks):
    link = CheckedLink(right)
    counters = drive(link, linked(link), running, blocks=blocks)
    assert link.asked
    assert link.contexts == {}, "contexts of finished requests are closed"
    assert counters["feature_bytes"] == 0
    assert counters["context_tokens"] == link.rows
    if right == 1.0:
        assert counters["accepted_tokens"] > 0.5 * counters["output_tokens"]


def test_plain_steps_between_drafted_ones_change_no_text_and_what_they_left_out_is_sent_later(running):
    class Moody(SpeculationControl):
        """Any number of drafts at any step, plain decoding for half of them."""

        mood = random.Random(3)

        def choose(self, requests: int, willing: int | None = None) -> int:
            return self.mood.choice([0, 0, 0, 1, 2, 3])

    class WholeLink(CheckedLink):
        def draft(self, ask: DraftAsk) -> DraftAnswer:
            assert sorted(self.contexts[ask.context_id]) == list(range(ask.base)), "a hole in the context"
            return super().draft(ask)

    link = WholeLink(right=1.0)
    counters = drive(link, linked(link, control=Moody(BLOCK - 1)), running)
    assert 0 < counters["drafted_tokens"] == counters["accepted_tokens"]
    assert {ask.rows for ask in link.asked} <= {1, 2, 3}


def test_a_control_learns_from_the_steps(running):
    link, control = CheckedLink(right=1.0), SpeculationControl(BLOCK - 1)
    drive(link, linked(link, control=control), running, names=2)
    assert control.expected(0.0) > 0.5


def test_after_a_new_epoch_the_window_is_sent_again(running):
    link = CheckedLink()
    link.drafter_load = Heartbeat(totals=DraftTotals(rows=12, busy_seconds=0.5))
    counters = drive(link, linked(link), running, at(link.begin_epoch, 4, 9))
    assert (counters["drafter_rows"], counters["drafter_busy_seconds"]) == (12.0, 0.5)
    assert counters["accepted_tokens"] > 0.4 * counters["output_tokens"]


@pytest.mark.parametrize("right", [0.0, 0.4])
def test_what_is_sent_again_is_what_was_kept_of_steps_that_filled_no_page(running, right):
    link = CheckedLink(right)
    drive(link, linked(link), running, at(link.begin_epoch, *range(3, 40, 5)))
    assert link.state.epoch > 3


def test_a_link_that_goes_and_comes_back_is_used_again(running):
    link = CheckedLink()

    class Unlinked(LinkProposer):
        """Counts steps without a link, and brings it back."""

        steps = 0

        def advance(self, progress, taps):
            super().advance(progress, taps)
            self.steps += not link.state.linked
            if self.steps == 5:
                self.steps += 1
                link.begin_epoch()

    proposer = Unlinked(
        link, TapFuser(), FeatureStore(1 << 20, 4, 2), verifier_id="v", max_draft_tokens=None, soft_deadline_s=0.01
    )
    drive(link, proposer, running, at(link.end_epoch, 3))
    assert link.state.epoch == 2
    assert link.asked


def test_an_evicted_context_is_built_again(running):
    link = CheckedLink()
    drive(link, linked(link), running, at(link.evict, *range(3, 60, 3)))


def test_a_context_that_lags_is_caught_up_only_while_the_drafter_takes_it_in(running):
    link = CheckedLink()

    def event(n: int) -> None:
        if n == 3:
            link.begin_epoch()
            link.queued_bytes = 1 << 30
            asked.append(len(link.asked))
            rows.append(link.rows)

    asked: list[int] = []
    rows: list[int] = []
    proposer = linked(link)
    drive(link, proposer, running, event, names=3)
    assert link.rows == rows[0], "nothing is sent on top of a full queue"


def test_a_silent_drafter_costs_few_waits_and_then_none(running):
    link = CheckedLink()
    link.silent = True
    counters = drive(link, linked(link), running)
    waits = [wait for wait in link.waits if wait > 0]
    assert 1 <= len(waits) < 12
    assert counters["drafts_missed"] > 0


def test_a_late_answer_is_used_where_it_still_fits(running):
    link = CheckedLink()
    link.silent = True

    def event(n: int) -> None:
        if n == 3:  # two steps after the first miss
            for ask in link.asked:
                link.answers[ask.context_id, ask.base] = link.draft(ask)

    counters = drive(link, linked(link), running, event, names=1)
    assert counters["drafts_late"] == 1
    assert counters["accepted_tokens"] > 0


def test_requests_without_drafts_cost_nothing(running):
    class Idle(TapFuser):
        def __call__(self, taps: torch.Tensor) -> torch.Tensor:
            raise AssertionError("features that nobody will want")

    link = CheckedLink()
    proposer = linked(link, fuser=Idle())
    engine = running(make_engine(proposer=proposer))
    inbox = Inbox()
    engine.submit(request("a", prompt=30, max_draft_tokens=0), inbox)
    inbox.wait("a")
    assert inbox.text("a") == expected("a", 30)
    assert (link.rows, link.asked) == (0, [])
    counters = engine.status().counters
    assert (counters["drafting_failures"], counters["block_feature_bytes"]) == (0, 0)
    assert proposer._contexts._unfused.taps == [], "nothing waits to be fused either"


def test_steps_are_launched_ahead_while_the_drafter_has_no_room_for_any_request(running):
    class Full(CheckedLink):
        """Keeps nothing, and says so."""

        def hold(self, context_id: str, start: int, features: torch.Tensor) -> None:
            self._lost.append(context_id)

        def ask(self, asks: Sequence[DraftAsk]) -> None:
            self.asked += asks

    link = Full()
    proposer = linked(link, soft_deadline_s=1e-6)
    counters = drive(link, proposer, running, names=3, runs_ahead=True)
    assert counters["steps_ahead"] > 15


def test_requests_that_want_no_drafts_are_run_ahead_whatever_the_drafter_is_good_for(running):
    control = SpeculationControl(BLOCK - 1)
    for _ in range(PLAIN_FIRST):
        control.choose(1)
    proposer = linked(CheckedLink(), control=control)
    engine = running(make_engine(proposer=proposer, runs_ahead=True))
    inbox = Inbox()
    engine.submit(request("a", output=20, max_draft_tokens=0), inbox)
    inbox.wait("a")
    assert engine.status().counters["steps_ahead"] >= 17


def test_no_more_is_asked_than_request_engine_and_output_allow(running):
    link = CheckedLink()
    engine = running(make_engine(proposer=linked(link, max_draft_tokens=4)))
    inbox = Inbox()
    engine.submit(request("a", output=20, max_draft_tokens=2), inbox)
    engine.submit(request("b", output=20), inbox)
    engine.submit(request("c", output=3), inbox)
    inbox.wait("a", "b", "c")
    most = {name: max(ask.rows for ask in link.asked if f"/{name}/" in ask.context_id) for name in "abc"}
    assert most == {"a": 2, "b": 4, "c": 1 + 1 - 1}


def test_only_the_window_of_a_long_prompt_is_sent(running):
    link = CheckedLink(window=16)
    engine = running(make_engine(proposer=linked(link), step_tokens=16))
    inbox = Inbox()
    engine.submit(request("a", prompt=90, output=1 + 1), inbox)
    inbox.wait("a")
    assert 16 <= link.rows <= 32


def test_seeded_sampling_is_the_same_with_a_link_and_without(running):
    texts = []
    for proposer in (None, linked(CheckedLink(0.8))):
        engine = running(make_engine(proposer=proposer))
        inbox = Inbox()
        for name in "abc":
            engine.submit(request(name, output=20, sampling=SamplingParams(temperature=0.7)), inbox)
        inbox.wait(*"abc")
        texts.append([inbox.text(name) for name in "abc"])
    assert texts[0] == texts[1]


def test_the_engine_runs_on_while_another_thread_changes_the_settings(running):
    link = CheckedLink(0.5)
    proposer = linked(link)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for count in (0, 3, 7):
                proposer.configure(count, 0.001)
                proposer.state()

    changer = threading.Thread(target=change)
    changer.start()
    try:
        drive(link, proposer, running)
    finally:
        stop.set()
        changer.join()
