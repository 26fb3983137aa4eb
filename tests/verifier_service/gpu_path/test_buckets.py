"""Which bucket a step runs in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from verifier_service.model.device.buckets import SECTION, Buckets, buckets

REQUESTS, LONGEST, ROWS, CONTEXT = 48, 16, 512, 40_000
ALL = Buckets(buckets(REQUESTS, LONGEST, ROWS, CONTEXT, SECTION))


@given(
    st.lists(st.integers(1, LONGEST), min_size=1, max_size=REQUESTS).filter(lambda rows: sum(rows) <= ROWS),
    st.integers(1, CONTEXT),
)
def test_every_step_within_the_limits_has_a_bucket_and_none_smaller_would_do(rows, context):
    found = ALL.smallest(len(rows), sum(rows), context)
    assert found is not None
    assert found.holds(len(rows), sum(rows), context)
    assert all(other >= found for other in ALL.all if other.holds(len(rows), sum(rows), context))


@given(st.integers(1, REQUESTS), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, CONTEXT))
def test_less_than_half_of_an_even_step_is_padding(requests, each, context):
    rows = requests * each
    if rows <= ROWS:
        found = ALL.smallest(requests, rows, context)
        assert found is not None
        assert found.rows < 2 * rows


def test_a_step_beyond_the_largest_bucket_has_none():
    assert ALL.smallest(REQUESTS + 1, 60, 100) is None
    assert ALL.smallest(40, ROWS + 1, 100) is None
    assert ALL.smallest(1, 1, CONTEXT + 1) is None


def test_contexts_are_bounded_where_they_are_cut_into_sections():
    assert {bucket.context for bucket in ALL.all} == {SECTION, 8 * SECTION, CONTEXT}
    assert {bucket.context for bucket in buckets(REQUESTS, LONGEST, ROWS, CONTEXT)} == {CONTEXT}
