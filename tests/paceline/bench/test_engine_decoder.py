import pytest

from cluster.contracts import Delta, Status
from paceline.bench.engine_decoder import Collector, growth
from paceline.bench.errors import BenchError


def delta(*token_ids, finish=None, error=None):
    return Delta("r", 0, token_ids, finish=finish, error=error)


def status(**counters):
    return Status(0, 1, 0.0, 0, 0, 1, 1, True, "d", 1, counters)


def test_the_first_delta_is_the_prefills_and_each_later_one_a_step():
    collector = Collector()
    for each in (delta(5), delta(6, 7, 8), delta(9, finish="length")):
        collector.add(each)
    assert collector.output().token_ids == (5, 6, 7, 8, 9)
    assert collector.output().commits == (3, 1)


def test_a_delta_without_tokens_is_no_step():
    collector = Collector()
    for each in (delta(), delta(5), delta(finish="stop")):
        collector.add(each)
    assert collector.output().commits == ()


@pytest.mark.parametrize("finish", ["error", "abort", "deadline"])
def test_a_request_that_the_engine_gives_up_ends_the_benchmark_with_its_reason(finish):
    with pytest.raises(BenchError, match=f"{finish}.*out of room"):
        Collector().add(delta(finish=finish, error="out of room"))


def test_counters_are_taken_as_growth_between_two_accounts():
    assert growth(status(a=1.0), status(a=3.5), "a") == 2.5
    assert growth(status(), status(a=3.5), "a") == 3.5
    assert growth(status(), status(), "a") is None
