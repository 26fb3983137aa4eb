from hypothesis import given
from hypothesis import strategies as st

from paceline.bench.loops import LONGEST_PERIOD, in_loops, tau


def test_text_without_repetition_has_no_loop():
    assert not any(in_loops(range(100)))


def test_a_cycle_said_twice_is_not_a_loop():
    assert not any(in_loops([1, 2, 3, 1, 2, 3, 9]))


def test_a_cycle_said_three_times_is_a_loop_from_its_second_occurrence_on():
    assert in_loops([7, 1, 2, 3, 1, 2, 3, 1, 2, 3, 9]) == (False,) * 4 + (True,) * 6 + (False,)


def test_text_after_a_loop_is_text_again():
    assert in_loops([5, 5, 5, 5, 1, 2, 3]) == (False, True, True, True, False, False, False)


@given(st.integers(1, LONGEST_PERIOD), st.integers(3, 5))
def test_every_period_up_to_the_longest_is_found(period, repeats):
    marks = in_loops([*range(100, 110), *range(period)] + list(range(period)) * (repeats - 1) + [200])
    assert marks == (False,) * (10 + period) + (True,) * (period * (repeats - 1)) + (False,)


def test_longer_periods_are_not_loops():
    assert not any(in_loops(list(range(LONGEST_PERIOD + 1)) * 4))


@given(st.lists(st.integers(0, 3), max_size=60))
def test_there_is_a_mark_for_each_token_and_never_one_on_the_first(token_ids):
    marks = in_loops(token_ids)
    assert len(marks) == len(token_ids)
    assert not any(marks[:1])


def test_tau_counts_tokens_per_decode_step():
    result = tau([(range(8), (3, 4)), (range(10, 13), (2,))])
    assert result.overall == 3
    assert result.outside_loops == 3
    assert result.loop_share == 0


def test_steps_inside_a_loop_are_left_out_of_the_outer_tau():
    token_ids = [1, 2, *[9] * 16]
    result = tau([(token_ids, (1, 1, 8, 7))])
    assert result.overall == 17 / 4
    assert result.outside_loops == 1
    assert result.loop_share == 15 / 18


def test_tau_without_a_decode_step_is_none():
    assert tau([((4,), ())]).overall is None
