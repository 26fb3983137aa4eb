"""The clock of a simulation, and the processes that wait for it."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from paceline.simulate.virtual_time import Process, VirtualTime


def test_events_come_in_order_and_those_of_one_moment_as_they_were_made():
    seen: list[tuple[str, float]] = []
    with VirtualTime() as time:
        for name, when in (("late", 2.0), ("early", 1.0), ("early too", 1.0), ("never", 9.0)):
            time.at(when, partial(lambda name: seen.append((name, time.now)), name))
        time.run(5.0)
        assert time.now == 5.0
    assert seen == [("early", 1.0), ("early too", 1.0), ("late", 2.0)]


def test_processes_take_turns_as_their_sleeps_end():
    seen: list[tuple[str, float]] = []

    def body(name: str, period: float):
        def run(process: Process) -> None:
            for _ in range(3):
                process.sleep(period)
                seen.append((name, time.now))

        return run

    with VirtualTime() as time:
        time.process(body("a", 2.0))
        time.process(body("b", 1.5))
        time.run(100.0)
    assert seen == [("b", 1.5), ("a", 2.0), ("b", 3.0), ("a", 4.0), ("b", 4.5), ("a", 6.0)]


def test_a_wait_ends_when_it_is_told_or_when_its_time_is_over():
    told: list[bool] = []
    ends: list[float] = []

    def body(process: Process) -> None:
        process.wait(lambda: bool(told), 10.0)
        ends.append(time.now)
        process.wait(lambda: False, 10.0)
        ends.append(time.now)

    with VirtualTime() as time:
        process = time.process(body)

        def tell() -> None:
            told.append(True)
            process.notify()

        time.at(1.0, process.notify)  # of nothing that it waits for
        time.at(4.0, tell)
        time.run(100.0)
    assert ends == [4.0, 14.0]


def test_time_can_be_stopped_inside_a_wait_and_goes_on_from_there():
    ends: list[float] = []

    def body(process: Process) -> None:
        process.sleep(3.0)
        ends.append(time.now)

    with VirtualTime() as time:
        time.process(body)
        time.run(2.0)
        assert ends == []
        time.run(4.0)
    assert ends == [3.0]


def test_what_a_process_raises_is_raised_where_time_runs_and_its_peers_end():
    def fail(process: Process) -> None:
        process.sleep(1.0)
        raise RuntimeError("broken")

    threads = threading.active_count()
    with VirtualTime() as time:
        time.process(lambda process: process.wait(lambda: False))
        time.process(fail)
        with pytest.raises(RuntimeError, match="broken"):
            time.run(5.0)
    assert threading.active_count() == threads
