"""The engine with its own thread, and verifiers that queue while it is busy."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cluster.link.messages import Draft, DraftAnswer, DraftAsk
from drafter_service.engine import DrafterEngine
from tests.drafter_service.pairs import settings_for
from tests.drafter_service.peers import CONTEXT, WAIT_S, RecordingPeer, features


class Threaded:
    """An engine with its thread, whose next pass can be held up while more is queued."""

    def __init__(self, engine: DrafterEngine, peers: Sequence[RecordingPeer]) -> None:
        self.engine, self.blocker = engine, RecordingPeer("blocker")
        for peer in (self.blocker, *peers):
            engine.linked(peer)

    def __enter__(self) -> None:
        self.blocker.hold.clear()
        self.engine.append(self.blocker, "blocker", 0, features(1))
        assert self.blocker.acked.wait(WAIT_S)

    def __exit__(self, *_: object) -> None:
        self.blocker.hold.set()


@pytest.fixture
def threaded(target_dir: Path, drafter_dir: Path) -> Iterator[DrafterEngine]:
    engine = DrafterEngine(settings_for(target_dir, drafter_dir, max_contexts=8, max_queue=4))
    yield engine
    engine.stop()


def test_each_verifier_gets_the_answers_of_a_pass_in_one_frame(threaded):
    peers = [RecordingPeer("one"), RecordingPeer("two")]
    with Threaded(threaded, peers):
        for peer in peers:
            for name in "ab":
                threaded.append(peer, name, 0, features(CONTEXT))
                threaded.draft(peer, Draft((DraftAsk(name, CONTEXT, 7, 2),)))
    for peer in peers:
        peer.wait_for(2)
        assert [[answer.context_id for answer in frame] for frame in peer.frames] == [["a", "b"]]
        assert all(answer.token_ids for answer in peer.answers)


def test_a_full_queue_answers_while_a_pass_is_under_way(threaded):
    peer = RecordingPeer()
    with Threaded(threaded, [peer]):
        threaded.draft(peer, Draft(tuple(DraftAsk(f"x{i}", 3, 7, 2) for i in range(6))))
        assert [answer.context_id for answer in peer.answers] == ["x4", "x5"]
        assert threaded.load().queue == 4
    assert len(peer.wait_for(6)) == 6


def test_a_verifier_lost_before_its_asks_are_drafted_is_not_answered(threaded):
    lost, peer = RecordingPeer("lost"), RecordingPeer()
    with Threaded(threaded, [lost, peer]):
        threaded.append(lost, "a", 0, features(CONTEXT))
        threaded.draft(lost, Draft((DraftAsk("a", CONTEXT, 7, 2),)))
        threaded.lost(lost)
        threaded.draft(peer, Draft((DraftAsk("a", CONTEXT, 7, 2),)))
    assert peer.wait_for(1) == [DraftAnswer("a", CONTEXT, (), ())]
    assert lost.frames == []


def test_the_load_tells_of_busy_passes(threaded):
    peer = RecordingPeer()
    threaded.linked(peer)
    threaded.append(peer, "a", 0, features(CONTEXT))
    threaded.draft(peer, Draft((DraftAsk("a", CONTEXT, 7, 2),)))
    peer.wait_for(1)
    threaded.stop()  # the pass is over
    load = threaded.load()
    assert load.seconds > 0
    assert 0 < load.utilisation <= 1
    assert threaded.load().utilisation == 0


def test_an_engine_that_fails_says_so_and_drafts_no_more(target_dir, drafter_dir):
    failures: queue.Queue[Exception] = queue.Queue()
    engine = DrafterEngine(settings_for(target_dir, drafter_dir), on_failure=failures.put)
    peer = RecordingPeer()
    peer.ack = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))  # type: ignore[method-assign]
    engine.linked(peer)
    engine.append(peer, "a", 0, features(2))
    assert "out of memory" in str(failures.get(timeout=WAIT_S))
    engine.stop()
