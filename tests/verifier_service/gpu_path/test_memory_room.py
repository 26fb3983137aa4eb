"""How the KV cache is sized: the arithmetic, and the steps that are run to measure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from triton.runtime.interpreter import GridExecutor

from modeling.device_memory import GRAPH_BYTES, DeviceMemory
from tests.held_memory import HeldMemory
from tests.verifier_service.gpu_path.tiny import TinyTarget, build
from tests.verifier_service.model.schedules import BLOCK_TOKENS
from verifier_service.config import VerifierSettings
from verifier_service.model.device import forms
from verifier_service.model.device.buckets import SECTION
from verifier_service.model.device.executor import KernelExecutor
from verifier_service.model.device.profile import measured_memory
from verifier_service.model.face import ForwardOutput
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.kv_storage import KvStorage
from verifier_service.model.largest_steps import LargestSteps
from verifier_service.model.memory_room import MemoryLimits, NoRoomError, kv_blocks
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

GB = 10**9
STEP_TOKENS = 16


def memory(taken: int, step: int, share: float) -> DeviceMemory:
    return DeviceMemory(100 * GB, share, (("weights", taken * GB), ("largest step", step * GB)))


@given(st.integers(0, 80), st.integers(0, 10), st.floats(0.1, 1.0))
def test_all_that_is_taken_stays_within_the_share(taken, step, share):
    found = memory(taken, step, share)
    try:
        blocks = kv_blocks(found, 1 << 20)
    except NoRoomError:
        assert (taken + step) * GB + (1 << 20) > share * 100 * GB - 1
    else:
        used = (taken + step) * GB + (blocks << 20)
        assert used <= share * 100 * GB < used + (2 << 20)


def test_a_device_without_room_is_told_what_takes_it_and_what_to_change():
    with pytest.raises(NoRoomError, match=r"weights 98\.0 GB, largest step 1\.0 GB.*raise tensor_parallel_size"):
        kv_blocks(memory(98, 1, 0.9), 1 << 20)


def test_the_table_adds_up_to_the_device():
    rows = memory(40, 10, 0.9).table("KV cache", 40 * GB).splitlines()
    assert [row.split()[-3:] for row in rows] == [
        ["40.00", "GB", "40.0%"],
        ["10.00", "GB", "10.0%"],
        ["40.00", "GB", "40.0%"],
        ["10.00", "GB", "10.0%"],
        ["100.00", "GB", "100.0%"],
    ]
    assert rows[3].split()[:2] == ["left", "free"]


@given(
    slots=st.integers(1, 9),
    longest_row=st.integers(1, 16),
    step_tokens=st.integers(16, 700),
    block_tokens=st.sampled_from([1, 3, 16]),
    max_context=st.integers(2, 900),
)
def test_the_largest_steps_are_as_large_as_a_step_may_be_and_have_their_blocks(
    slots, longest_row, step_tokens, block_tokens, max_context
):
    verify_rows = max(slots, min(slots * longest_row, step_tokens))
    steps = LargestSteps(slots, verify_rows, step_tokens, block_tokens, max_context, sectioned_rows=256)
    owned = [0] * slots
    for slot, block in steps.tables().new_blocks:
        assert 0 <= block < steps.blocks
        owned[slot] += block_tokens
    plans = list(steps.plans())
    for plan in plans:
        work = work_of(plan)
        assert len({item.slot for item in work}) == len(work)
        assert all(item.start + len(item.token_ids) <= min(max_context, owned[item.slot]) for item in work)
    assert max(map(tokens_of, plans)) <= max(step_tokens, verify_rows)
    assert tokens_of(plans[0]) == min(step_tokens, slots * max_context)
    assert tokens_of(plans[2]) == sum(min(count, max_context) for count in counts(verify_rows, slots))
    assert all(any(item.start + len(item.token_ids) == max_context for item in work_of(p)) for p in plans)


def tokens_of(plan: StepPlan) -> int:
    return sum(len(item.token_ids) for item in work_of(plan))


def work_of(plan: StepPlan) -> list[VerifyRow | PrefillChunk]:
    return [*plan.verify, *plan.prefill]


def counts(rows: int, slots: int) -> list[int]:
    return [rows // slots + (slot < rows % slots) for slot in range(slots)]


class Metered:
    """An executor and its meter: a step of `rows` tokens takes 10 bytes each; blocks 100, states 7, other buffers 2."""

    cache_bytes, state_bytes, saved_bytes = 0, 4, 3
    checkpoints: int | None = None

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.now = self.most = 1000

    def make(self, blocks: int) -> Metered:
        self.cache_bytes = 100 * blocks
        self.now += self.cache_bytes + 7 + 2
        return self

    def execute(self, plan: StepPlan, *_: object) -> ForwardOutput:
        self.plans.append(plan)
        self.most = max(self.most, self.now + 10 * tokens_of(plan))
        return ForwardOutput(None, None)

    def rehearse(self) -> int:
        self.most = self.now + 55
        return 3

    @property
    def counters(self) -> dict[str, float]:
        return {}

    def outside(self) -> tuple[int, int]:
        assert len(self.plans) > 1, "communicators and kernels are there once steps have run"
        return 5000, 20_000

    def held(self) -> int:
        self.most = self.now
        return self.now

    def peak(self) -> int:
        most, self.most = self.most, self.now
        return most


def test_what_each_part_takes_is_measured_apart_from_the_cache():
    device = Metered()
    steps = LargestSteps(3, 10, 64, 4, 50, sectioned_rows=256)
    limits = MemoryLimits(0.5, 64, later=11)
    found, block = measured_memory(device.make, device, steps, limits, weight_bytes=990, checkpoint_bytes=30, taps=())
    assert block == 100
    left_over = device.cache_bytes + 9  # this executor is never let go
    assert found == DeviceMemory(
        20_000,
        0.5,
        (
            ("weights", 990),
            ("recurrent states", 4),
            ("their checkpoints", 30),
            ("buffers", 10 + 2 + left_over),
            ("driver, communicators, other processes", 5000),
            ("loaded later", 11),
            ("largest step", 640),
            ("CUDA graphs", 55 + 3 * GRAPH_BYTES),
        ),
    )


@pytest.fixture
def idle_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take their arguments and do nothing, but for those that say where tokens lie: memory is the same."""
    run = GridExecutor.__call__

    def launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if self.fn.__module__ == "kernels.step_inputs.kernel":
            run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)


@pytest.mark.parametrize(
    ("family", "heads", "width"), [("qwen3", 4, 16), ("qwen3_5_moe", 2, 16), ("deepseek_v3", 2, 32)]
)
def test_a_longer_context_costs_partial_sums_where_it_is_cut_at_fixed_multiples(
    family, heads, width, tmp_path, idle_kernels
):
    target, sums = build(family, tmp_path), 32 * STEP_TOKENS * heads * (width + 2) * 4
    short, long = (largest_step(target, sections * SECTION, forms.DETERMINISTIC) for sections in (64, 96))
    assert long - short >= sums
    short, long = (largest_step(target, sections * SECTION, forms.FAST) for sections in (64, 96))
    assert long - short < sums


def largest_step(target: TinyTarget, max_context: int, mixing: forms.KernelForms) -> int:
    model = target.runner(deterministic=mixing is forms.DETERMINISTIC)._model

    def make(blocks: int) -> KernelExecutor:
        return KernelExecutor(
            model,
            BlockTables(2, -(-max_context // BLOCK_TOKENS), BLOCK_TOKENS, blocks),
            KvStorage(blocks, BLOCK_TOKENS, "auto", torch.float32, "cpu"),
            first=True,
            vocabulary=64,
            num_slots=2,
            max_context=max_context,
            checkpoint_bytes=0,
            path=KernelPath("triton", longest_row=2, graphs=False),
            forms=mixing,
        )

    steps = LargestSteps(2, 4, STEP_TOKENS, BLOCK_TOKENS, max_context, sectioned_rows=256)
    with HeldMemory(GB) as meter, torch.inference_mode():
        found, _ = measured_memory(make, meter, steps, MemoryLimits(), weight_bytes=0, checkpoint_bytes=0, taps=())
    return dict(found.parts)["largest step"]


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        ({"device": "cpu"}, "set a number of tokens, such as 65536"),
        ({"device": "cuda", "kernels": "torch"}, "only over kernels"),
        ({"device": "cuda", "drafter": "d", "speculation": {"mode": "colocated"}}, "the drafter is loaded after"),
    ],
)
def test_auto_is_refused_where_nothing_can_be_measured(given, cure):
    settings = {"target": "t", "kv_cache_tokens": "auto", "speculation": {"mode": "none"}, **given}
    with pytest.raises(ValidationError, match=cure):
        VerifierSettings.model_validate(settings)
