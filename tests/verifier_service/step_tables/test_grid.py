"""Interpolation over measured seconds."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier_service.step_tables.grid import Grid

LINEAR: dict[tuple[int, ...], float] = {
    (n, k, c): 1.0 + 2 * n + 3 * k + 0.5 * c for n, k, c in product((1, 4, 16), (1, 2, 8), (10, 100))
}


@pytest.mark.parametrize("where", [(1, 1, 10), (16, 8, 100), (3, 5, 70), (8.5, 1, 33.0)])
def test_a_linear_function_is_met_everywhere_in_the_grid(where):
    n, k, c = where
    assert Grid(LINEAR).at(*where) == pytest.approx(1.0 + 2 * n + 3 * k + 0.5 * c)


@pytest.mark.parametrize("where", [(64, 8, 100), (2, 16, 50), (16, 1, 4000), (64, 16, 100)])
def test_the_last_slope_goes_on_beyond_the_grid(where):
    n, k, c = where
    assert Grid(LINEAR).at(*where) == pytest.approx(1.0 + 2 * n + 3 * k + 0.5 * c)


def test_below_an_axis_its_first_value_holds():
    assert Grid(LINEAR).at(0.5, 0, 1) == Grid(LINEAR).at(1, 1, 10)


def test_a_point_that_was_not_measured_goes_on_by_the_slope_below_it():
    points = {where: seconds for where, seconds in LINEAR.items() if where[0] < 16 or where[2] < 100}
    assert Grid(points).at(16, 2, 100) == pytest.approx(LINEAR[16, 2, 100])


def test_an_axis_of_one_value_says_nothing():
    grid = Grid({(1, 8): 2.0, (4, 8): 5.0})
    assert grid.at(4, 2) == grid.at(4, 8) == grid.at(4, 100) == 5.0


axis = st.lists(st.integers(1, 200), min_size=1, max_size=4, unique=True).map(sorted)
place = st.tuples(*[st.floats(0.5, 400)] * 3)


@given(st.data(), axis, axis, axis, place, place)
def test_more_work_never_takes_less_time_whatever_was_measured(data, first, second, third, one, other):
    """Noise, holes and places beyond the grid included."""
    every = list(product(first, second, third))
    kept = [where for where in every[1:] if data.draw(st.booleans())]
    points: dict[tuple[int, ...], float] = {where: data.draw(st.floats(1e-4, 1.0)) for where in [every[0], *kept]}
    grid = Grid(points)
    low, high = tuple(map(min, zip(one, other))), tuple(map(max, zip(one, other)))
    assert grid.at(*low) <= grid.at(*high) * (1 + 1e-9)
    assert grid.at(*one) >= min(points.values()) * (1 - 1e-9)
