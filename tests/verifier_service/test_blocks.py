"""The block pool never hands out a block twice and never loses one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verifier_service.blocks import BlockPool, OutOfBlocksError


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.sampled_from("asr"), st.integers(0, 30)), max_size=80))
def test_every_block_is_free_or_used_exactly_as_often_as_it_was_taken(total: int, events: list[tuple[str, int]]):
    pool = BlockPool(total)
    users: Counter[int] = Counter()
    for kind, number in events:
        taken = sorted(block for block, count in users.items() if count)
        if kind == "a":
            if number > pool.free:
                with pytest.raises(OutOfBlocksError):
                    pool.allocate(number)
            else:
                fresh = pool.allocate(number)
                assert len(set(fresh)) == number
                assert not set(fresh) & set(taken)
                users.update(fresh)
        elif taken and kind == "s":
            pool.share([taken[number % len(taken)]])
            users[taken[number % len(taken)]] += 1
        elif taken:
            pool.release([taken[number % len(taken)]])
            users[taken[number % len(taken)]] -= 1
        assert pool.free == total - sum(1 for count in users.values() if count)
        assert all(pool.users(block) == users[block] for block in range(total))


def test_releasing_a_free_block_is_an_error():
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="block 1"):
        pool.release([1])
    with pytest.raises(ValueError, match="block 1"):
        pool.share([1])


def test_a_forgotten_block_without_users_is_blank_and_handed_out_once():
    pool = BlockPool(3)
    (first, second) = pool.allocate(2)
    pool.cache(first, b"first")
    pool.cache(second, b"second")
    pool.release([first])
    pool.forget([first, second])
    assert (pool.idle, pool.cached, pool.free) == (0, 0, 2)
    assert pool.find(b"first") is None
    assert sorted([*pool.allocate(2), second]) == [0, 1, 2]
    pool.release([second])
    assert pool.allocate(1) == [second]
