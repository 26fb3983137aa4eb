from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from cluster.link.local import LocalLink
from cluster.link.messages import DraftAsk, DraftTotals, Heartbeat, Piece, Share
from tests.cluster.link.echo import HIDDEN, Echo, append, connect, echoed, eventually, serve


@pytest.fixture(params=["tcp", "torch", "local"])
def pair(request, stops):
    """(link, handler), joined; the handler runs in this process, so tests see what it heard."""

    def make(**settings):
        handler = Echo()
        if request.param == "local":
            link = stops(LocalLink(handler, hidden=HIDDEN, vocabulary=1000, **settings))
        else:
            server = stops(serve(handler))
            link = stops(connect(server.address, tensor_transport=request.param, **settings))
        eventually(lambda: link.state.linked)
        return link, handler

    return make


def heard_of(take: Callable[[], list[str]]) -> list[str]:
    """What is taken, once there is something."""
    found: list[str] = []

    def heard() -> bool:
        found.extend(take())
        return bool(found)

    eventually(heard)
    return found


def test_an_ask_is_answered(pair):
    link, _ = pair()
    ask = DraftAsk("v/r/0", base=5, bonus_token=7, rows=3)
    link.ask([ask])
    assert link.collect([ask], 5.0) == [echoed(ask)]


def test_an_answer_is_handed_out_once(pair):
    link, _ = pair()
    ask = DraftAsk("v/r/0", 5, 7, 3)
    link.ask([ask])
    assert link.collect([ask], 5.0)
    started = time.monotonic()
    assert link.collect([ask], 5.0) == []
    assert time.monotonic() - started < 1.0


def test_features_arrive_in_order_before_the_ask_that_needs_them(pair):
    link, handler = pair()
    features = torch.randn(40, HIDDEN)
    asks = [DraftAsk(f"v/{r}/0", 4, 7, 2) for r in range(5)]
    for r, ask in enumerate(asks):
        append(link, ask.context_id, 0, features[8 * r : 8 * r + 3])
        append(link, ask.context_id, 3, features[8 * r + 3 : 8 * r + 8])
    link.ask(asks)
    assert len(link.collect(asks, 5.0)) == 5
    for r, ask in enumerate(asks):
        assert [start for start, _ in handler.features[ask.context_id]] == [0, 3]
        assert torch.equal(handler.rows(ask.context_id), features[8 * r : 8 * r + 8])


def test_what_a_step_has_for_many_contexts_is_sent_in_one_call(pair):
    link, handler = pair()
    counts = [1 + r % 4 for r in range(700)]  # more than a frame holds
    features = torch.randn(sum(counts), HIDDEN)
    pieces = [Piece(f"v/{r}/0", r, count) for r, count in enumerate(counts)]
    asks = [DraftAsk(piece.context_id, piece.start + piece.count, 7, 2) for piece in pieces]
    link.append(pieces, features)
    link.ask(asks)
    assert link.collect(asks, 10.0) == [echoed(ask) for ask in asks]
    for piece, own in zip(pieces, features.split(counts)):
        ((start, rows),) = handler.features[piece.context_id]
        assert start == piece.start
        assert torch.equal(rows, own)


def test_features_arrive_without_an_ask(pair):
    link, handler = pair()
    append(link, "v/r/0", 0, torch.ones(2, HIDDEN))
    eventually(lambda: "v/r/0" in handler.features)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_features_are_cast_to_the_dtype_of_the_link(pair, dtype):
    link, handler = pair(dtype=dtype)
    features = torch.randn(6, HIDDEN, dtype=torch.float64)
    append(link, "v/r/0", 0, features[::2])
    eventually(lambda: "v/r/0" in handler.features)
    received = handler.rows("v/r/0")
    assert received.dtype == getattr(torch, dtype)
    assert torch.equal(received, features[::2].to(received.dtype))


def test_closed_contexts_reach_the_drafter(pair):
    link, handler = pair()
    link.close_contexts(["v/a/0", "v/b/0"])
    eventually(lambda: handler.closed == ["v/a/0", "v/b/0"])


def test_what_a_context_shares_reaches_the_drafter_between_the_appends_around_it_and_a_refusal_comes_back(pair):
    link, handler = pair()
    features, share = torch.randn(4, HIDDEN), Share("v/b/0", "v/a/0", 0, 4)
    append(link, "v/a/0", 0, features)
    link.share(share)
    append(link, "v/b/0", 4, features)
    link.ask([DraftAsk("v/b/0", 8, 7, 2)])
    eventually(lambda: handler.asks)
    assert handler.order == ["v/a/0", share, "v/b/0"]
    assert heard_of(link.unshared) == ["v/b/0"]
    assert link.unshared() == []


def test_an_evicted_context_is_reported_once(pair):
    link, handler = pair()
    eventually(lambda: handler.peers)
    handler.peers[0].evicted("v/r/0")
    assert heard_of(link.evicted) == ["v/r/0"]
    assert link.evicted() == []


def test_an_answer_from_another_thread_ends_the_wait(pair):
    link, handler = pair()
    handler.answering = False
    ask = DraftAsk("v/r/0", 5, 7, 3)
    link.ask([ask])
    assert link.collect([ask], 0.01) == []
    eventually(lambda: handler.asks)
    handler.peers[0].answer([echoed(ask)])
    assert link.collect([ask], 5.0) == [echoed(ask)]


def test_the_state_tells_what_the_drafter_said(pair):
    link, _ = pair()
    state = link.state
    assert (state.linked, state.epoch, state.drafter_id, state.drafter_version) == (True, 1, "echo", "version")
    assert (state.block_size, state.window) == (8, 128)


def test_a_stopped_link_swallows_everything(pair):
    link, _ = pair()
    link.stop()
    ask = DraftAsk("v/r/0", 5, 7, 3)
    append(link, "v/r/0", 0, torch.ones(1, HIDDEN))
    link.ask([ask])
    assert link.collect([ask], 5.0) == []
    link.close_contexts(["v/r/0"])
    assert not link.state.linked


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_long_appends_are_split_and_may_be_overwritten_at_once(stops, transport):
    handler = Echo()
    server = stops(serve(handler, hard_deadline_s=5.0))
    link = stops(connect(server.address, hidden=4096, tensor_transport=transport, hard_deadline_s=5.0))
    eventually(lambda: link.state.linked)
    features = torch.randn(2500, 4096)  # 41 MB
    sent = features.clone()
    append(link, "v/r/0", 10, features)
    features.zero_()
    ask = DraftAsk("v/r/0", 2510, 7, 3)
    link.ask([ask])
    assert link.collect([ask], 10.0)
    assert [start for start, _ in handler.features["v/r/0"]] == [10, 1034, 2058]
    assert torch.equal(handler.rows("v/r/0"), sent)
    assert link.queued_bytes == 0
    assert link.state.sent_bytes >= sent.nbytes


def test_features_of_another_width_are_an_error_of_the_caller(stops):
    server = stops(serve(Echo()))
    link = stops(connect(server.address))
    eventually(lambda: link.state.linked)
    with pytest.raises(ValueError, match=f"{HIDDEN + 1} wide"):
        append(link, "v/r/0", 0, torch.ones(1, HIDDEN + 1))


def test_heartbeats_carry_the_drafters_load(stops):
    server = stops(serve(Echo(), load=lambda: Heartbeat(3, 0.5, 0.01, DraftTotals(rows=7, busy_seconds=1.5))))
    link = stops(connect(server.address))
    eventually(lambda: link.drafter_load.queue == 3)
    assert link.drafter_load.totals == DraftTotals(rows=7, busy_seconds=1.5)


def test_a_failing_load_callback_does_not_end_the_link(stops):
    server = stops(serve(Echo(), load=lambda: Heartbeat(queue=1 // 0)))
    link = stops(connect(server.address))
    eventually(lambda: link.state.linked)
    with pytest.raises(AssertionError):
        eventually(lambda: not link.state.linked, within_s=1.0)
