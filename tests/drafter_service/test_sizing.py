"""Draft contexts against a device's memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from drafter_service.attention import Block
from drafter_service.engine import block_drafter
from drafter_service.loading import load_drafter
from drafter_service.profile import MANY_BLOCKS, measured_memory
from drafter_service.sizing import MOST, ContextSize, StepBytes, chosen_contexts, contexts_that_fit
from modeling.device_memory import DeviceMemory
from paceline.plan.memory import DrafterModel, drafter_memory
from tests.drafter_service.pairs import settings_for, write_drafter, write_target
from tests.held_memory import HeldMemory

SIZE = ContextSize(window=4096, block_size=16, row_bytes=20_480)
STEP = StepBytes(smallest=10**9, block=10**7, most_blocks=64)
GB = 10**9


def memory(contexts: int, share: float = 1.0) -> DeviceMemory:
    """With room for so many contexts and the step, and half a context."""
    total = round((contexts + 0.5) * SIZE.bytes + STEP.of(contexts))
    return DeviceMemory(5 * GB + total, share, (("weights", 5 * GB),))


@given(
    room=st.integers(0, 10_000),
    context=st.integers(1, 500),
    smallest=st.integers(0, 2000),
    block=st.integers(0, 300),
    most=st.integers(1, 40),
)
def test_no_more_contexts_would_fit_and_these_do(room, context, smallest, block, most):
    step = StepBytes(smallest, block, most)
    count = contexts_that_fit(room, context, step)
    assert count == 0 or count * context + step.of(count) <= room
    assert (count + 1) * context + step.of(count + 1) > room


def test_contexts_that_fit_are_taken_and_one_more_is_refused_with_the_number_that_fits():
    assert chosen_contexts(7, SIZE, memory(7), STEP)[0] == 7
    with pytest.raises(ConfigError, match=r"max_contexts is 8.*84 MB.*only 7 fit.*weights 5\.0 GB.*max_contexts to 7"):
        chosen_contexts(8, SIZE, memory(7), STEP)


def test_a_number_may_take_what_auto_leaves_free():
    small = memory(40, share=0.8)
    count, table = chosen_contexts("auto", SIZE, small, STEP)
    assert 1 <= count < 40
    assert chosen_contexts(40, SIZE, small, STEP)[0] == 40
    assert f"{count} draft contexts" in table
    assert "left free" in table


def test_auto_takes_no_more_contexts_than_can_be_of_use():
    tiny = ContextSize(window=16, block_size=4, row_bytes=8)
    assert chosen_contexts("auto", tiny, DeviceMemory(80 * GB, 0.9, ()), StepBytes(0, 0, 1))[0] == MOST


def test_memory_that_holds_none_asks_for_a_smaller_window():
    for wanted in (1, "auto"):
        with pytest.raises(ConfigError, match=r"only 0 fit .*set a smaller window$"):
            chosen_contexts(wanted, SIZE, DeviceMemory(GB, 0.9, ()), STEP)


def test_a_context_is_as_large_as_the_plan_says():
    model = DrafterModel(0, 0, 0, 0, 0, 0, False, SIZE.block_size, 2, SIZE.row_bytes, 0)
    assert drafter_memory(model, SIZE.window, 1, None).context_bytes == SIZE.bytes


@torch.inference_mode()
def test_what_was_measured_holds_a_draft_of_all_contexts_that_it_makes_room_for(tmp_path: Path):
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter")
    with HeldMemory(0) as meter:
        loaded = load_drafter(settings_for(target, drafter, window=64))
        make = partial(block_drafter, loaded, graphs=False)
        found, step = measured_memory(loaded, make, meter, 1.0, max_queue=1024)
        assert dict(found.parts)["weights and what is beside them"] == meter.held()
        size = ContextSize(loaded.window, loaded.config.block_size, loaded.model.row_bytes)
        contexts = 2 * MANY_BLOCKS
        room = contexts * size.bytes + step.of(contexts)
        assert contexts_that_fit(room, size.bytes, step) == contexts
        before = meter.held()
        whole = block_drafter(loaded, contexts)
        ready = meter.held()
        assert ready - before < 1.01 * contexts * size.bytes
        block = Block(0, 64, 64, loaded.config.block_size, stale=False)
        whole.draft([block] * contexts, [0] * contexts)
        taken = meter.peak()
        assert taken - before <= 1.02 * room
        assert 0.8 * step.block * contexts < taken - ready <= 1.02 * step.block * contexts
