"""While a process repeats its step, the collector leaves alone what was loaded; afterwards all is as before."""

from __future__ import annotations

import gc

from verifier_service.settled import YOUNG, settled


def test_what_is_loaded_is_frozen_inside_and_the_collector_is_as_before_afterwards():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with settled():
        assert gc.get_threshold() == (YOUNG, *before[1:])
        assert gc.get_freeze_count() > frozen + 1000
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_cycles_of_later_objects_are_still_collected():
    class Node:
        count = 0

        def __init__(self) -> None:
            Node.count += 1
            self.itself = self

        def __del__(self) -> None:
            Node.count -= 1

    with settled():
        for _ in range(3 * YOUNG):
            Node()
        assert Node.count < 2 * YOUNG
