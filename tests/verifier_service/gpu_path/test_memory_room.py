"""How the KV cache is sized: the arithmetic, and the steps that are run to measure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from verifier_service.config import VerifierSettings
from verifier_service.model.device.profile import measured_memory
from verifier_service.model.face import ForwardOutput
from verifier_service.model.memory_room import DeviceMemory, NoRoomError
from verifier_service.plan import StepPlan

GB = 10**9


@given(st.integers(0, 80), st.integers(0, 10), st.integers(0, 4096), st.floats(0.1, 1.0))
def test_all_that_is_taken_stays_within_the_share(taken, step, graph_rows, share):
    memory = DeviceMemory(100 * GB, taken * GB, step * GB, graph_rows, 2048)
    try:
        blocks = memory.blocks(share, 1 << 20)
    except NoRoomError:
        assert (taken + step) * GB + memory.graphs + (1 << 20) > share * 100 * GB - 1
    else:
        used = (taken + step) * GB + memory.graphs + (blocks << 20)
        assert used <= share * 100 * GB < used + (2 << 20)


def test_a_device_without_room_is_told_what_takes_it_and_what_to_change():
    with pytest.raises(NoRoomError, match=r"weights, states and other processes 79\.0 GB.*raise tensor_parallel_size"):
        DeviceMemory(80 * GB, 79 * GB, GB, 64, 2048).blocks(0.9, 1 << 20)


class Metered:
    """An executor and its meter: a step of `rows` tokens takes 10 bytes each; blocks 100, states 7."""

    cache_bytes = 0
    checkpoints: int | None = None

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.held = self.most = 1000

    def make(self, blocks: int) -> Metered:
        self.cache_bytes = 100 * blocks
        self.held += self.cache_bytes + 7
        return self

    def execute(self, plan: StepPlan, *_: object) -> ForwardOutput:
        self.plans.append(plan)
        tokens = sum(len(work.token_ids) for part in (plan.verify, plan.prefill) for work in part)
        self.most = max(self.most, self.held + 10 * tokens)
        return ForwardOutput(None, None)

    @property
    def counters(self) -> dict[str, float]:
        return {}

    def used(self) -> tuple[int, int]:
        return 5000, 20_000

    def allocated(self) -> int:
        return self.held

    def peak(self) -> int:
        most, self.most = self.most, self.held
        return most


def test_what_the_largest_steps_take_is_measured_apart_from_the_cache():
    device = Metered()
    found, block = measured_memory(
        device.make, device, slots=3, verify_rows=10, step_tokens=64, block_tokens=4, max_context=50
    )
    assert block == 100
    assert found == DeviceMemory(total=20_000, taken=5007, step=10 * 50, graph_rows=10, step_rows=50)
    prompt, verify = device.plans
    assert [len(chunk.token_ids) for chunk in prompt.prefill] == [50]
    assert [len(row.token_ids) for row in verify.verify] == [4, 3, 3]
    owned = [block for plan in device.plans for _, block in plan.new_blocks]
    assert len(owned) == len(set(owned)), "no two rows write to one block"


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
