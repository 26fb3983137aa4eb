"""Draft contexts against a device's memory."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from drafter_service.sizing import RESERVED_BYTES, ContextSize, check_contexts
from paceline.plan.memory import DrafterModel, drafter_memory

SIZE = ContextSize(window=4096, block_size=16, row_bytes=20_480)


def test_contexts_that_fit_are_taken_and_one_more_is_refused_with_the_number_that_fits():
    free = RESERVED_BYTES + 7 * SIZE.bytes
    check_contexts(7, SIZE, free)
    with pytest.raises(ConfigError, match=r"max_contexts is 8.*84 MB.*only 7 fit.*set max_contexts to 7"):
        check_contexts(8, SIZE, free)


def test_memory_that_holds_none_asks_for_a_smaller_window():
    with pytest.raises(ConfigError, match=r"only 0 fit .*set a smaller window$"):
        check_contexts(1, SIZE, RESERVED_BYTES // 2)


def test_a_context_is_as_large_as_the_plan_says():
    model = DrafterModel(0, 0, 0, 0, 0, 0, False, SIZE.block_size, 2, SIZE.row_bytes, 0)
    assert drafter_memory(model, SIZE.window, 1, None).context_bytes == SIZE.bytes
