"""The verifier's sampling on a GPU, against its sampling on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cluster.contracts import SamplingParams
from verifier_service.sampling.draw import Draw, draw_rows, wanted_rows
from verifier_service.sampling.kernel_draw import draw_by_kernels

PLAIN: list[dict[str, Any]] = [{}, {"temperature": 0.4}]
TRUNCATED: list[dict[str, Any]] = [{"top_k": 7}, {"top_p": 0.8, "temperature": 2.0}, {"min_p": 0.1}, {"top_k": 10**6}]


@pytest.mark.parametrize("wanted", [PLAIN, PLAIN + TRUNCATED], ids=["plain", "truncated"])
def test_requests_of_all_kinds_in_one_step_get_the_same_tokens(wanted: list[dict[str, Any]]):
    draws = [
        Draw(
            2 * at,
            2,
            position=40 + at,
            seed=2**64 - at,
            choice=at % 2,
            params=SamplingParams(**{"temperature": 1.0, **each}),
        )
        for at, each in enumerate(wanted)
    ]
    logits = torch.randn(2 * len(draws), 100) * 4
    want_rows, want = draw_rows(logits, draws)
    rows, own = wanted_rows(draws, torch.device("cpu"))
    assert torch.equal(rows, want_rows)
    assert own.truncated == (wanted is not PLAIN)
    assert torch.equal(draw_by_kernels(logits, own), want)
