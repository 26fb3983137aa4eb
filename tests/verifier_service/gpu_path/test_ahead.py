"""A plan that names the rows of the step before says what one with the tokens themselves says."""

from __future__ import annotations

import pytest
import torch

from tests.verifier_service.gpu_path.tiny import TinyTarget, build
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

PROMPTS = ((5, 6, 7), (8, 9))
FIRST = StepPlan(
    1,
    prefill=tuple(PrefillChunk(slot, 0, ids, True) for slot, ids in enumerate(PROMPTS)),
    new_blocks=((0, 3), (1, 4), (0, 5), (1, 6)),
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TinyTarget:
    return build("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_token_that_the_host_has_not_seen_is_put_in_by_the_device(kernels, target):
    def second(ahead: bool) -> torch.Tensor:
        runner = target.runner(kernels)
        logits = runner.forward(FIRST).logits
        assert logits is not None
        taken = logits.argmax(-1)
        runner.feed(taken)
        ids = [-2, -1] if ahead else taken.flip(0).tolist()
        rows = (VerifyRow(1, len(PROMPTS[1]), (ids[0],)), VerifyRow(0, len(PROMPTS[0]), (ids[1],)))
        output = runner.forward(StepPlan(2, verify=rows, ahead=ahead)).logits
        assert output is not None
        return output

    torch.testing.assert_close(second(True), second(False), rtol=0, atol=0)


def test_a_step_after_one_that_took_no_token_needs_none(target):
    runner = target.runner("torch")
    prompt = tuple(range(6))
    runner.forward(StepPlan(1, prefill=(PrefillChunk(0, 0, prompt[:3], False),), new_blocks=((0, 0), (0, 1))))
    runner.feed(torch.empty(0, dtype=torch.long))
    logits = runner.forward(StepPlan(2, prefill=(PrefillChunk(0, 3, prompt[3:], True),), ahead=True)).logits
    assert logits is not None
    assert logits.isfinite().all()
