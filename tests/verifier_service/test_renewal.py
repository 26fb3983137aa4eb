"""A proposer that fails is replaced by a fresh one while requests run on; text is the model's own throughout."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch

from cluster.contracts import Configure
from cluster.link.face import VerifierLink
from tests.verifier_service.test_engine import WAIT_S, Guesser, Inbox, expected, make_engine, request, running
from tests.verifier_service.test_linked import CheckedLink, linked
from tests.verifier_service.test_port import Slow, eventually
from verifier_service.proposers import renewal as module
from verifier_service.proposers.plain import NoProposer
from verifier_service.proposers.renewal import Renewal
from verifier_service.sequence import Progress

__all__ = ["running"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.001)


class Failing(Guesser):
    """Fails in the third call of one of its methods. stopped: set when it has been ended."""

    def __init__(self, where: str):
        super().__init__(1.0)
        self._where = where
        self._calls = 0
        self.stopped = threading.Event()
        self.told: list[object] = []

    def _may_fail(self, name: str) -> None:
        self._calls += name == self._where
        if self._calls == 3:
            raise ValueError("a broken drafter")

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        self._may_fail("advance")
        super().advance(progress, taps)

    def collect(self) -> float:
        self._may_fail("collect")
        return super().collect()

    def learn(self, progress: Sequence[Progress], prefilled: bool, seconds: float) -> None:
        self._may_fail("learn")

    def set_drafters(self, addresses: Sequence[str]) -> None:
        self.told.append(tuple(addresses))

    def configure(self, max_draft_tokens: int | None, soft_deadline_s: float | None) -> None:
        self.told.append((max_draft_tokens, soft_deadline_s))

    def stop(self) -> None:
        self.stopped.set()


@pytest.mark.parametrize("where", ["advance", "collect", "learn"])
def test_drafting_comes_back_after_each_failure_and_no_text_changes(running, where):
    made: list[Failing] = []

    def make() -> Failing:
        made.append(Failing(where) if len(made) < 3 else Failing("nowhere"))
        return made[-1]

    engine = running(make_engine(Slow(4, 300, 4, max_context=1024), make(), make_proposer=make, blocks=300))
    inbox = Inbox()
    for name in "abc":
        engine.submit(request(name, output=100), inbox)
    inbox.wait(*"abc")
    rounds = 0
    while len(made) < 4 and rounds < 100:  # as many requests as it takes for the last one to be there
        rounds += 1
        engine.submit(request(f"r{rounds}", output=50), inbox)
        inbox.wait(f"r{rounds}")
    for name in "abc":
        assert inbox.text(name) == expected(name, output=100)
    assert all(each.stopped.wait(WAIT_S) for each in made[:3])
    before = engine.status().counters
    engine.submit(request("z", output=60), inbox)
    inbox.wait("z")
    after = engine.status().counters
    assert inbox.text("z") == expected("z", output=60)
    assert after["drafting_failures"] == 3
    assert after["accepted_tokens"] > before["accepted_tokens"]


def test_a_successor_is_told_the_drafters_and_settings_that_came_before_it(running):
    fresh = Failing("nowhere")
    engine = make_engine(proposer=Failing("advance"), make_proposer=lambda: fresh, heartbeat_s=0.01)
    engine.set_drafters(["one:1"])
    engine.configure(Configure(max_draft_tokens=3))
    engine.set_drafters(["two:2"])
    engine.configure(Configure(soft_deadline_s=0.5))
    inbox = Inbox()
    running(engine).submit(request("a"), inbox)
    inbox.wait("a")
    assert eventually(lambda: bool(fresh.told))
    engine.set_drafters(["three:3"])
    assert fresh.told == [(3, 0.5), ("two:2",), ("three:3",)]


def test_a_link_that_raises_is_built_afresh_and_its_features_are_sent_from_where_the_requests_stand(running):
    links: list[CheckedLink] = []

    class Broken(CheckedLink):
        def ask(self, asks) -> None:
            if len(self.asked) > 4:
                raise RuntimeError("no link is like this")
            super().ask(asks)

    class Blind(CheckedLink):
        """Drafts from what it holds, which is not the whole context."""

        def draft(self, ask):
            blind = min(self.contexts[ask.context_id]) > 0
            starts.add(blind)
            return super().draft(ask)

    starts: set[bool] = set()

    def make():
        links.append(Blind() if links else Broken())
        link: VerifierLink = links[-1]
        return linked(link)  # type: ignore[arg-type]

    engine = running(make_engine(Slow(4, 300, 4, max_context=1024), make(), make_proposer=make, blocks=300))
    inbox = Inbox()
    for name in "ab":
        engine.submit(request(name, output=110), inbox)
    inbox.wait(*"ab")
    for name in "ab":
        assert inbox.text(name) == expected(name, output=110)
    engine.stop()
    assert len(links) == 2
    assert True in starts, "requests that were running when it failed get drafts again"
    assert links[1].contexts == {}


def test_attempts_keep_their_distance_while_they_fail(monkeypatch):
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(module, "LAST_DELAY_S", 0.04)
    attempts: list[float] = []

    def build() -> NoProposer:
        attempts.append(time.monotonic())
        if len(attempts) < 5:
            raise RuntimeError("not yet")
        return NoProposer()

    renewal = Renewal(build)
    began = time.monotonic()
    renewal.begin(NoProposer())
    assert eventually(lambda: renewal.take() is not None)
    distances = [later - earlier for earlier, later in zip([began, *attempts], attempts)]
    assert all(distance >= least for distance, least in zip(distances, (0.01, 0.02, 0.04, 0.04, 0.04)))


def test_what_is_built_after_the_end_is_ended_at_once():
    building, go, stopped = threading.Event(), threading.Event(), threading.Event()

    class Late(NoProposer):
        def stop(self) -> None:
            stopped.set()

    def build() -> Late:
        building.set()
        assert go.wait(WAIT_S)
        return Late()

    renewal = Renewal(build)
    renewal.begin(NoProposer())
    assert building.wait(WAIT_S)
    renewal.stop()
    go.set()
    assert stopped.wait(WAIT_S)
    assert renewal.take() is None
