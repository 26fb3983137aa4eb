import pytest

from paceline.bench.agreement import Agreement
from paceline.bench.figures import row
from paceline.bench.runs import Output, Run


def run(seconds, **counters):
    return Run(seconds, (Output((1, 2, 3, 4), (3,)), Output((5,))), **counters)


def test_speed_is_the_median_of_the_repeats_and_their_spread_is_kept():
    made = row("drafted", 8, [run(1.0), run(5.0), run(0.5)], None, None)
    assert (made.tokens_per_s, made.slowest, made.fastest) == (5.0, 1.0, 10.0)


def test_the_ratio_is_taken_within_each_repeat():
    # The second repeat ran on a machine four times slower: both rows suffered alike.
    made = row("drafted", 1, [run(1.0), run(4.0)], [run(2.0), run(8.0)], None)
    assert made.ratio == pytest.approx(2.0)


def test_rows_without_decode_steps_have_no_tau():
    assert row("transformers", 1, [Run(1.0, (Output((1, 2)),))], None, None).tau is None
    drafted = row("drafted", 1, [run(1.0)], None, None).tau
    assert drafted is not None
    assert drafted.overall == 3


def test_draft_share_is_draft_time_of_step_time():
    made = row("drafted", 1, [run(1.0, draft_seconds=0.2, step_seconds=0.8)], None, None)
    assert made.draft_share == pytest.approx(0.25)
    assert row("plain", 1, [run(1.0)], None, None).draft_share is None


def test_gap_share_is_the_median_of_the_runs():
    shares = (0.01, 0.3, 0.02)
    assert row("plain", 1, [run(1.0, gap_share=share) for share in shares], None, None).gap_share == 0.02
    assert row("transformers", 1, [run(1.0)], None, None).gap_share is None


def test_link_bytes_are_per_token_whose_features_were_sent():
    assert row("drafted", 1, [run(1.0, link_bytes=10_000, context_tokens=10)], None, None).link_bytes == 1000


def test_a_decoder_that_sends_nothing_has_no_link_bytes():
    assert row("colocated", 1, [run(1.0, link_bytes=0, context_tokens=10)], None, None).link_bytes is None


def test_agreement_is_said_in_words():
    assert row("plain", 1, [run(1.0)], None, Agreement(2, 0, 0, None)).text == "equal"
