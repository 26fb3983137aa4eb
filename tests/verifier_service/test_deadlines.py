"""Which deadlines have passed, and that finished requests leave nothing behind."""

from __future__ import annotations

import random

from verifier_service.deadlines import SPARE, Deadlines


def test_each_passed_deadline_comes_up_once_and_forgotten_ones_never():
    rng = random.Random(4)
    deadlines = Deadlines()
    live = {}
    for i in range(1000):
        key = (f"r{i}", 0)
        live[key] = rng.random()
        deadlines.add(key, live[key])
        if rng.random() < 0.8:
            gone = rng.choice(list(live))
            del live[gone]
            deadlines.forget(gone)
    assert sorted(deadlines.passed(0.5)) == sorted(key for key, at in live.items() if at <= 0.5)
    assert sorted(deadlines.passed(1.0)) == sorted(key for key, at in live.items() if at > 0.5)
    assert deadlines.passed(2.0) == []


def test_finished_requests_do_not_pile_up():
    deadlines = Deadlines()
    deadlines.add(("lasting", 0), 1e9)
    for i in range(10_000):
        deadlines.add((f"r{i}", 0), 1e9 + i)
        deadlines.forget((f"r{i}", 0))
    assert len(deadlines._heap) <= SPARE + 4
    assert deadlines.passed(2e9) == [("lasting", 0)]
