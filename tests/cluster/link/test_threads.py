from __future__ import annotations

import os
import threading

import pytest

from cluster.link.messages import Refused
from tests.cluster.link.echo import Echo, Verifier, connect, eventually, serve


@pytest.mark.parametrize("transport", ["tcp", "torch"])
def test_stop_ends_every_thread_and_frees_every_descriptor(transport):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def live_and_die() -> None:
        server = serve(Echo())
        links = [connect(server.address, tensor_transport=transport, verifier_id=f"v{i}") for i in range(3)]
        links.append(connect("127.0.0.1:1"))
        links.append(connect())
        eventually(lambda: all(link.state.linked for link in links[:3]))
        links[0].stop()
        server.stop()
        for link in links:
            link.stop()

    live_and_die()  # whatever torch opens once
    threads, files = set(threading.enumerate()), descriptors()
    live_and_die()
    assert set(threading.enumerate()) <= threads
    eventually(lambda: descriptors() <= files)


def test_a_connection_that_ends_takes_its_thread_with_it():
    server = serve(Echo())
    threads = len(threading.enumerate())
    verifiers = [Verifier(server.address, verifier_id=f"v{i}") for i in range(5)]
    assert len(threading.enumerate()) == threads + 5
    for verifier in verifiers:
        verifier.close()
    eventually(lambda: len(threading.enumerate()) == threads)
    server.stop()


def test_verifiers_beyond_the_limit_are_refused_until_one_leaves(stops):
    server = stops(serve(Echo(), max_links=2))
    first, second = Verifier(server.address, verifier_id="a"), Verifier(server.address, verifier_id="b")
    third = Verifier(server.address, verifier_id="c")
    assert isinstance(third.welcome, Refused)
    assert "2 verifiers are linked to this drafter" in third.welcome.reason
    assert third.hears_the_end()
    first.close()
    second.close()
    link = stops(connect(server.address, verifier_id="d"))
    eventually(lambda: link.state.linked)


def test_stop_may_be_called_twice():
    server = serve(Echo())
    link = connect(server.address)
    for thing in (link, server, link, server):
        thing.stop()
