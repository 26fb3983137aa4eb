"""Acceptance and where output is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from verifier_service.acceptance import accepted_drafts, cut

tokens = st.integers(0, 3)


@given(st.lists(tokens, min_size=1, max_size=9), st.data(), st.integers(0, 3))
def test_drafts_stand_as_long_as_they_equal_the_targets_own_samples(row: list[int], data: st.DataObject, before: int):
    samples = data.draw(st.lists(tokens, min_size=len(row), max_size=len(row)))
    count = accepted_drafts(row, [9] * before + samples, before)
    drafts = row[1:]
    assert drafts[:count] == samples[:count]
    assert count == len(drafts) or drafts[count] != samples[count]


@given(
    st.lists(tokens, min_size=1, max_size=9),
    st.integers(0, 20),
    st.sets(tokens, max_size=2),
    st.integers(0, 25),
    st.integers(1, 9),
)
def test_output_is_cut_as_one_token_at_a_time_would_be(
    new: list[int], generated: int, stops: set[int], least: int, more: int
):
    most = generated + more
    least = min(least, most)
    expected: tuple[int, str | None] = (0, None)
    for index, token in enumerate(new, 1):
        expected = (index, None)
        if token in stops and generated + index > least:
            expected = (index, "stop")
            break
        if generated + index >= most:
            expected = (index, "length")
            break
    assert cut(new, generated, stops, least, most) == expected
