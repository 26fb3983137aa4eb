from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.link.candidates import LAST_DELAY_S, Candidates


def chosen(candidates: Candidates) -> tuple[str, float]:
    choice = candidates.next()
    assert choice is not None
    return choice


def test_there_is_nothing_to_dial_without_candidates():
    assert Candidates().next() is None


def test_the_best_is_dialled_first_and_at_once():
    candidates = Candidates()
    candidates.replace(["a", "b"])
    assert candidates.next() == ("a", 0.0)


def test_another_candidate_is_preferred_after_a_failure():
    candidates = Candidates()
    candidates.replace(["a", "b"])
    candidates.failed("a")
    assert candidates.next() == ("b", 0.0)


def test_candidates_that_all_fail_take_turns_with_growing_delays():
    candidates = Candidates(seed=1)
    candidates.replace(["a", "b"])
    turns, delays = [], []
    for _ in range(40):
        address, delay = chosen(candidates)
        turns.append(address)
        delays.append(delay)
        candidates.failed(address)
    assert turns == ["a", "b"] * 20
    assert delays[:2] == [0.0, 0.0]
    assert 0.025 <= delays[2] <= 0.05
    assert all(0.5 * LAST_DELAY_S <= delay <= LAST_DELAY_S for delay in delays[-10:])


def test_a_long_dead_candidate_is_soon_tried_again_when_the_other_dies():
    candidates = Candidates()
    candidates.replace(["a", "b"])
    for _ in range(1000):
        candidates.failed("a")
    tried = []
    for _ in range(10):
        tried.append(chosen(candidates)[0])
        candidates.failed(tried[-1])
    assert "a" in tried


def test_a_link_that_stood_for_a_while_forgives_failures():
    candidates = Candidates()
    candidates.replace(["a"])
    candidates.failed("a")
    candidates.proved("a")
    assert candidates.next() == ("a", 0.0)


def test_an_address_that_stays_keeps_its_record():
    candidates = Candidates()
    candidates.replace(["a"])
    candidates.failed("a")
    candidates.replace(["a", "b"])
    assert candidates.next() == ("b", 0.0)


@given(st.lists(st.sampled_from("abcd"), min_size=1, unique=True), st.lists(st.sampled_from("abcd")))
def test_the_delay_is_always_bounded(addresses, failures):
    candidates = Candidates()
    candidates.replace(addresses)
    for address in failures:
        candidates.failed(address)
        address, delay = chosen(candidates)
        assert address in addresses
        assert 0.0 <= delay <= LAST_DELAY_S
