"""Changes of single logits before sampling (bias, penalties, bans) and of whole rows (a grammar's bit mask).

All draws' edits are applied together, by one gather and one scatter: their cost is that of the tokens concerned, not
of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling.copies import to_device

MASKED_ROWS = 64  # at once: unpacked bits take as much memory as logits, twice


@dataclass(frozen=True)
class Edits:
    """Of one request's `count` rows.

    A logit x of ids[j] in row i becomes y - minus[i, j], where y is x + plus[j], divided by times[i, j] if it is above
    0 and multiplied by it if not. ids: int64 [tokens], distinct; plus: float32 [tokens]; times, minus: float32
    [count, tokens], minus may be inf. allowed: int32 [count, words], bit b of word w is token 32 w + b; what it does
    not hold becomes -inf. None: everything is.
    """

    ids: np.ndarray
    plus: np.ndarray
    times: np.ndarray
    minus: np.ndarray
    allowed: torch.Tensor | None = None


def mask_only(allowed: torch.Tensor) -> Edits:
    none = np.zeros((len(allowed), 0), np.float32)
    return Edits(np.zeros(0, np.int64), none[0], none, none, allowed)


def apply_edits(logits: torch.Tensor, edits: Sequence[tuple[int, Edits]]) -> None:
    """In place, on float32 [rows, vocabulary]; each with the first of its rows."""
    if changes := [(row, each) for row, each in edits if len(each.ids)]:
        _change(logits, changes)
    if masks := [(row, each.allowed) for row, each in edits if each.allowed is not None]:
        _mask(logits, masks)


def _change(logits: torch.Tensor, edits: Sequence[tuple[int, Edits]]) -> None:
    vocabulary = logits.shape[1]
    columns: list[tuple[np.ndarray, ...]] = []
    for row, each in edits:
        starts = np.arange(row, row + len(each.times))[:, None] * vocabulary
        every_plus = np.broadcast_to(each.plus, each.times.shape)
        columns.append(((starts + each.ids).ravel(), every_plus.ravel(), each.times.ravel(), each.minus.ravel()))
    places, plus, times, minus = (
        to_device(torch.from_numpy(np.concatenate(part)), logits.device) for part in zip(*columns)
    )
    values = logits.take(places).add_(plus)
    logits.put_(places, torch.where(values > 0, values / times, values * times).sub_(minus))


def _mask(logits: torch.Tensor, masks: Sequence[tuple[int, torch.Tensor]]) -> None:
    words = to_device(torch.cat([allowed for _, allowed in masks]), logits.device)
    rows = None
    if len(words) < len(logits):
        every = torch.cat([torch.arange(row, row + len(allowed)) for row, allowed in masks])
        rows = to_device(every, logits.device)
    for first in range(0, len(words), MASKED_ROWS):
        piece = slice(first, first + MASKED_ROWS)
        forbidden = _forbidden(words[piece], logits.shape[1])
        if rows is None:
            logits[piece].masked_fill_(forbidden, -torch.inf)
        else:
            logits[rows[piece]] = logits[rows[piece]].masked_fill_(forbidden, -torch.inf)


def _forbidden(words: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """bool [rows, vocabulary]"""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> bits) & 1).reshape(len(words), -1)[:, :vocabulary] == 0
