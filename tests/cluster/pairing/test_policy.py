from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.pairing.policy import assign, preference

VERIFIERS = st.sets(st.integers(0, 30).map(lambda i: f"v{i}"), max_size=12)
DRAFTERS = st.sets(st.integers(0, 30).map(lambda i: f"d{i}"), max_size=6)
LINKS = st.dictionaries(st.integers(0, 30).map(lambda i: f"v{i}"), st.integers(0, 30).map(lambda i: f"d{i}"))


@given(VERIFIERS, DRAFTERS, LINKS)
def test_every_verifier_gets_a_living_drafter_and_loads_differ_by_at_most_one(verifiers, drafters, links):
    chosen = assign(verifiers, drafters, links)
    if not drafters:
        assert chosen == {}
        return
    assert set(chosen) == verifiers
    assert set(chosen.values()) <= drafters
    counts = Counter(dict.fromkeys(drafters, 0))
    counts.update(chosen.values())
    assert max(counts.values()) - min(counts.values()) <= 1


@given(VERIFIERS, DRAFTERS, LINKS)
def test_an_assignment_once_reached_stays(verifiers, drafters, links):
    chosen = assign(verifiers, drafters, links)
    assert assign(sorted(verifiers, reverse=True), sorted(drafters, reverse=True), chosen) == chosen


@given(VERIFIERS.filter(len), DRAFTERS.filter(len), LINKS)
def test_a_drafter_that_dies_moves_only_its_own_verifiers_when_the_rest_is_level(verifiers, drafters, links):
    before = assign(verifiers, drafters, links)
    victim = sorted(drafters)[0]
    after = assign(verifiers, drafters - {victim}, before)
    survivors = drafters - {victim}
    counts = Counter(before[v] for v in verifiers if before[v] != victim)
    if survivors and all(counts[d] == counts[sorted(survivors)[0]] for d in survivors):
        assert all(after[v] == before[v] for v in verifiers if before[v] != victim)


@given(VERIFIERS.filter(len), DRAFTERS.filter(len), LINKS)
def test_the_assigned_drafter_comes_first_and_each_is_listed_once(verifiers, drafters, links):
    verifier = sorted(verifiers)[0]
    listed = preference(verifier, verifiers, drafters, links)
    assert listed[0] == assign(verifiers, drafters, links)[verifier]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= drafters


def test_the_live_link_stays_first_and_the_rest_is_listed_behind_it():
    listed = preference("v0", ["v0"], ["d0", "d1", "d2"], {"v0": "d1"})
    assert listed[0] == "d1"
    assert set(listed) == {"d0", "d1", "d2"}


def test_one_of_two_verifiers_leaves_a_shared_drafter_when_a_second_drafter_comes():
    links = {"v0": "d0", "v1": "d0"}
    lists = {v: preference(v, ["v0", "v1"], ["d0", "d1"], links) for v in ("v0", "v1")}
    moving = [v for v, listed in lists.items() if listed[0] == "d1"]
    assert len(moving) == 1
    assert lists[moving[0]] == ("d1",), "the drafter to leave is not listed, or the link would be kept"


def test_without_drafters_nothing_is_listed():
    assert preference("v0", ["v0"], [], {"v0": "d0"}) == ()
