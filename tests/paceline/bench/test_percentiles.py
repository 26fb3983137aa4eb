import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.bench.percentiles import percentile, percentiles

SAMPLES = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=50)


@given(SAMPLES, st.sampled_from([0, 10, 50, 90, 99, 100]))
def test_percentiles_are_numpys(samples, percent):
    assert np.isclose(percentile(samples, percent), np.percentile(samples, percent))


def test_no_samples_have_no_percentiles():
    assert percentiles([]) is None


def test_the_summary_counts_its_samples():
    summary = percentiles([3.0, 1.0, 2.0])
    assert summary is not None
    assert (summary.p50, summary.mean, summary.count) == (2.0, 2.0, 3)
