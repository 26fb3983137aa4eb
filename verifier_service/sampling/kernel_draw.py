"""Seeded sampling on a GPU: nothing is sorted, nothing as large as the logits is made, nothing waits for the device."""

from __future__ import annotations

import torch

from kernels.acceptance.kernel import sample
from kernels.truncation.kernel import truncate
from verifier_service.sampling.draw import WantedRows


def draw_by_kernels(logits: torch.Tensor, rows: WantedRows) -> torch.Tensor:
    """Tokens int64 [rows] of logits [rows, vocabulary], the same as on a CPU; -1 where the logits are not finite."""
    thresholds = None
    if rows.truncated:
        thresholds = truncate(logits, rows.temperature, rows.top_k.int(), rows.top_p, rows.min_p)
    return sample(logits, rows.keys, rows.temperature, thresholds=thresholds)[0]
