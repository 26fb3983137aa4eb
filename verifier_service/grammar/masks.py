"""Which tokens each row of a step may have: bit masks, computed beside the target's forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from llguidance import LLExecutor

from verifier_service.flight import SampledRows

Masks = dict[int, torch.Tensor]  # by a request's first row of the logits: int32 [rows, words], as Edits.allowed
NO_MASKS: Masks = {}


class MaskFiller:
    """Row i of a request is masked by its grammar after drafts[:i]; the grammars' own state is as before.

    Drafts that a grammar forbids must be gone. Everything runs without the interpreter's lock.
    """

    def __init__(self, vocabulary: int):
        self._words = -(-vocabulary // 32)
        self._executor = LLExecutor()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-masks")

    def start(self, rows: Sequence[SampledRows]) -> Callable[[], Masks]:
        """rows: of requests that have a grammar, at least one. The call that comes back waits for the masks."""
        return self._thread.submit(self._fill, rows).result

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _fill(self, rows: Sequence[SampledRows]) -> Masks:
        total = sum(each.count for each in rows)
        words = torch.full((total, self._words), -1, dtype=torch.int32)
        alone, before_drafts = [], []
        masks: Masks = {}
        first = 0
        for each in rows:
            constraint = each.sequence.shaping.constraint
            if each.drafts:
                before_drafts.append((constraint.matcher, first, list(each.drafts)))
            else:
                alone.append((constraint.matcher, first))
            masks[each.row] = words[first : first + each.count]
            first += each.count
        place = words.data_ptr(), self._words * words.element_size(), total
        if alone:
            self._executor.unsafe_compute_mask_ptr(alone, *place)
        if before_drafts:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(before_drafts, *place)
        for each in rows:
            _defer_ends(masks[each.row].numpy(), each)
        return masks


def _defer_ends(mask: np.ndarray, rows: SampledRows) -> None:
    """No end before min_new_tokens, in place: but where the grammar leaves nothing else, it may end."""
    sequence = rows.sequence
    early = sequence.request.min_new_tokens - sequence.generated
    if early <= 0:
        return
    ends = np.zeros(mask.shape[1], np.uint32)
    for token in sequence.shaping.constraint.ends:
        ends[token // 32] |= np.uint32(1 << token % 32)
    without = mask[:early] & ~ends.view(np.int32)
    going_on = without.any(axis=1)
    mask[:early][going_on] = without[going_on]
