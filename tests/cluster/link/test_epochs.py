from __future__ import annotations

import logging
import signal
import time

import pytest
import torch

from cluster.link import candidates
from cluster.link.messages import DraftAsk, Refused, Welcome
from tests.cluster.link.echo import HARD_DEADLINE_S, HIDDEN, TOKEN, Echo, Verifier, append, connect, eventually, serve


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_a_killed_drafter_ends_the_epoch_and_the_next_drafter_takes_over(stops, drafter_process, transport):
    first, second = drafter_process, stops(serve(Echo("second")))
    link = stops(connect(first.address, second.address, tensor_transport=transport))
    eventually(lambda: link.state.drafter_id == "first")
    ask = DraftAsk("v/r/0", 5, 7, 3)
    append(link, "v/r/0", 0, torch.ones(4, HIDDEN))
    first.signal(signal.SIGKILL)
    eventually(lambda: link.state.drafter_id == "second", within_s=HARD_DEADLINE_S)
    assert link.state.linked
    assert link.state.epoch == 2
    append(link, "v/r/0", 0, torch.ones(4, HIDDEN))
    link.ask([ask])
    assert len(link.collect([ask], 5.0)) == 1
    assert link.counters["epochs_ended"] == 1


def test_a_wait_for_answers_ends_with_the_epoch(stops):
    handler = Echo()
    handler.answering = False
    server = stops(serve(handler))
    link = stops(connect(server.address))
    eventually(lambda: link.state.linked)
    ask = DraftAsk("v/r/0", 5, 7, 3)
    link.ask([ask])
    eventually(lambda: handler.asks)
    server.stop()
    started = time.monotonic()
    assert link.collect([ask], 30.0) == []
    assert time.monotonic() - started < 5.0


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_a_stalled_drafter_costs_the_soft_timeout_then_its_epoch_and_may_come_back(stops, drafter_process, transport):
    first, second = drafter_process, stops(serve(Echo("second")))
    link = stops(connect(first.address, tensor_transport=transport))
    eventually(lambda: link.state.linked)
    first.signal(signal.SIGSTOP)
    ask = DraftAsk("v/r/0", 5, 7, 3)
    append(link, "v/r/0", 0, torch.ones(4, HIDDEN))
    started = time.monotonic()
    link.ask([ask])
    assert link.collect([ask], 0.05) == []
    assert 0.05 <= time.monotonic() - started < 0.3
    assert link.state.linked
    eventually(lambda: not link.state.linked, within_s=4 * HARD_DEADLINE_S)

    link.set_drafters([first.address, second.address])
    eventually(lambda: link.state.drafter_id == "second")
    epoch = link.state.epoch
    first.signal(signal.SIGCONT)
    link.ask([ask])
    assert len(link.collect([ask], 5.0)) == 1
    assert link.state.epoch == epoch
    link.set_drafters([first.address])
    eventually(lambda: link.state.linked and link.state.drafter_id == "first")
    append(link, "v/r/0", 0, torch.ones(4, HIDDEN))
    link.ask([ask])
    assert len(link.collect([ask], 5.0)) == 1


def test_the_link_moves_only_when_its_drafter_is_no_longer_listed(stops):
    first, second = Echo("first"), Echo("second")
    servers = [stops(serve(first)), stops(serve(second))]
    link = stops(connect(servers[0].address))
    eventually(lambda: link.state.linked)
    link.set_drafters([servers[1].address, servers[0].address])
    ask = DraftAsk("v/r/0", 5, 7, 3)
    link.ask([ask])
    assert len(link.collect([ask], 5.0)) == 1
    assert (link.state.drafter_id, link.state.epoch) == ("first", 1)
    link.set_drafters([servers[1].address])
    eventually(lambda: link.state.drafter_id == "second")
    eventually(lambda: first.lost_peers == first.peers)


def test_a_drafter_that_starts_later_is_found(stops):
    early = serve(Echo())
    address = early.address
    early.stop()
    link = stops(connect(address))
    eventually(lambda: link.counters["dial_failures"])
    assert not link.state.linked
    stops(serve(Echo("late"), port=int(address.rpartition(":")[2])))
    eventually(lambda: link.state.drafter_id == "late")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:0", "127.0.0.1:x", ":70000", "no.such.host.invalid:1"])
def test_an_impossible_address_is_logged_and_the_next_candidate_is_tried(stops, caplog, address):
    server = stops(serve(Echo()))
    link = stops(connect(address, server.address))
    eventually(lambda: link.state.linked, within_s=30)
    assert address in caplog.text


def test_a_wrong_token_is_refused_said_once_at_both_ends_and_tried_again_without_haste(stops, caplog, monkeypatch):
    monkeypatch.setattr(candidates, "BARRED_DELAY_S", 0.05)
    handler = Echo()
    server = stops(serve(handler))
    with caplog.at_level(logging.WARNING):
        began = time.monotonic()
        link = stops(connect(server.address, token="wrong"))
        eventually(lambda: link.counters["refused"] >= 3)
    assert time.monotonic() - began >= 2 * 0.05
    ours, theirs = (
        [r.message for r in caplog.records if r.name.endswith(end)] for end in ("verifier_end", "drafter_end")
    )
    assert len(ours) == 1
    assert len(theirs) >= 3
    assert all("verifier.link.token" in line for line in (*ours, *theirs))
    assert "wrong" not in caplog.text
    assert TOKEN not in caplog.text
    assert not link.state.linked
    assert handler.hellos == []


def test_another_candidate_is_tried_after_a_refusal(stops):
    strict, open_door = stops(serve(Echo("strict"), token="other")), stops(serve(Echo("open")))
    link = stops(connect(strict.address, open_door.address))
    eventually(lambda: link.state.drafter_id == "open")
    assert link.state.epoch == 1


def test_a_newer_epoch_of_a_verifier_ends_its_earlier_one(stops):
    handler = Echo()
    server = stops(serve(handler))
    old, new = Verifier(server.address, epoch=3), Verifier(server.address, epoch=4)
    assert isinstance(new.welcome, Welcome)
    eventually(lambda: len(handler.lost_peers) == 1)
    assert handler.lost_peers[0].link_id.startswith("v#3")
    assert old.hears_the_end()
    new.close()


def test_an_older_epoch_of_a_verifier_is_refused(stops):
    server = stops(serve(Echo()))
    new, old = Verifier(server.address, epoch=4), Verifier(server.address, epoch=3)
    assert isinstance(old.welcome, Refused)
    assert "epoch is 3" in old.welcome.reason
    assert old.hears_the_end()
    new.close()


def test_answers_to_an_earlier_epoch_go_nowhere(stops):
    handler = Echo()
    handler.answering = False
    server = stops(serve(handler))
    link = stops(connect(server.address))
    eventually(lambda: link.state.linked)
    ask = DraftAsk("v/r/0", 5, 7, 3)
    link.ask([ask])
    eventually(lambda: handler.asks)
    old = handler.peers[0]
    old.connection.close("the test ends this epoch")
    eventually(lambda: link.state.epoch == 2)
    link.ask([ask])
    eventually(lambda: len(handler.asks) == 2)
    old.answer([])
    old.evicted("v/r/0")
    assert link.collect([ask], 0.05) == []
    assert link.evicted() == []
    assert old.link_id != handler.peers[1].link_id
