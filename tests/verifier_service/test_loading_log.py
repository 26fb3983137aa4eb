"""A log of loading tells how far it is, now and then."""

from __future__ import annotations

import logging

from modeling.weights import LoadProgress
from verifier_service.loading_log import PERIOD_S, log_progress


def test_a_line_now_and_then_and_one_at_the_end(caplog):
    times = iter([0.0, 1.0, PERIOD_S + 1, PERIOD_S + 2, PERIOD_S + 3])
    told = log_progress(logging.getLogger("loading"), clock=lambda: next(times))
    with caplog.at_level(logging.INFO):
        for tensors in (1, 50, 51, 100):
            told(LoadProgress(tensors, 100, tensors * 10**8))
    assert [record.getMessage() for record in caplog.records] == [
        f"loading the target [{'#' * 12}{'.' * 12}] 50/100 tensors, 5.0 GB on this rank",
        f"loading the target [{'#' * 24}] 100/100 tensors, 10.0 GB on this rank",
    ]
