"""Deterministic mode over kernels: a row's logits are the same bits, whatever is in the step and however it was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.products import sum_products_in_order
from tests.verifier_service.gpu_path.rank_threads import ThreadRanks, in_turns
from tests.verifier_service.gpu_path.tiny import LONGEST_ROW, OVERRIDES, VOCABULARY
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.schedules import BLOCK_TOKENS, SLOTS
from verifier_service.model import runner as runners
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.runner import TargetRunner
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

pytestmark = [pytest.mark.filterwarnings(f"ignore:{what} encountered") for what in ("overflow", "invalid value")]
pytestmark.append(pytest.mark.filterwarnings("ignore:All-NaN slice encountered"))  # of padding
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    "qwen3_5_moe": {"linear_num_key_heads": 2, "num_experts": 4},  # so that two ranks can share the heads
    "gpt_oss": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "num_local_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4},
}
TEXT = (5, 91, 17, 230, 8, 44, 44, 3, 129)
PROMPT = 6
BLOCKS = tuple((slot, 4 * slot + index) for slot in range(SLOTS) for index in range(4))
# Alone: the prompt in one chunk, then token by token.
ALONE = (
    StepPlan(1, new_blocks=BLOCKS, prefill=(PrefillChunk(1, 0, TEXT[:PROMPT], completes_prompt=True),)),
    StepPlan(2, verify=(VerifyRow(1, 6, TEXT[6:7]),)),
    StepPlan(3, decided=((1, 1),), verify=(VerifyRow(1, 7, TEXT[7:8]),)),
    StepPlan(4, decided=((1, 1),), verify=(VerifyRow(1, 8, TEXT[8:9]),)),
)
# In each step's logits, the rows of TEXT from the prompt's last token on.
ROWS_ALONE: tuple[tuple[int, ...], ...] = ((0,), (0,), (0,), (0,))
ROWS_BESIDE: tuple[tuple[int, ...], ...] = ((), (2,), (1, 2), (2,))


def beside(recurrent: bool) -> tuple[StepPlan, ...]:
    """Another request begins alike, in two chunks of one step; its first block (and state) is found again. Then drafts,
    of which some are wrong, behind the other's rows.
    """
    mine = ((1, 0), (1, 4), (1, 5))
    return (
        StepPlan(
            1,
            new_blocks=BLOCKS[:4],
            prefill=(
                PrefillChunk(0, 0, TEXT[:1], completes_prompt=False),
                PrefillChunk(0, 1, TEXT[1:4], completes_prompt=True, checkpoint=0 if recurrent else -1),
            ),
        ),
        StepPlan(
            2,
            new_blocks=mine,
            restored=((1, 0),) if recurrent else (),
            verify=(VerifyRow(0, 4, (9, 2)),),
            prefill=(PrefillChunk(1, 4, TEXT[4:PROMPT], completes_prompt=True),),
        ),
        StepPlan(3, decided=((0, 1),), verify=(VerifyRow(0, 5, (3,)), VerifyRow(1, 6, (*TEXT[6:8], 200, 11)))),
        StepPlan(4, decided=((0, 1), (1, 2)), verify=(VerifyRow(0, 6, (1, 2)), VerifyRow(1, 8, (TEXT[8], 12)))),
    )


def logits(directory: Path, plans, rows, *, deterministic: bool = True, size: int = 1) -> torch.Tensor:
    """[tokens, vocabulary] of TEXT's last tokens, by rank 0 of `size`."""

    def run(ranks: ThreadRanks) -> list[torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runners, "join_ranks", lambda *_: ranks)
            runner = TargetRunner(
                directory,
                rank=ranks.rank,
                size=size,
                num_blocks=len(BLOCKS),
                block_tokens=BLOCK_TOKENS,
                num_slots=SLOTS,
                dtype=torch.float32,
                device="cpu",
                max_context=16,
                checkpoint_bytes=1 << 16,
                kernel_path=KernelPath("triton", longest_row=LONGEST_ROW),
                deterministic=deterministic,
            )
        made = [runner.forward(plan).logits for plan in plans]
        return [one[list(own)] for one, own in zip(made, rows, strict=True) if one is not None]

    return torch.cat(in_turns(size, run)[0])


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sum_products_in_order(monkeypatch)

    def built(family: str) -> Path:
        model = tiny_targets.make(family, **{**OVERRIDES[family], **CHANGES[family]})
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.data.fill_(-2.0)  # states that last: what fades within a token hides how it was added up
        model.save_pretrained(tmp_path)
        return tmp_path

    return built


@pytest.mark.parametrize(
    "family",
    [family if family != "deepseek_v3" else pytest.param(family, marks=pytest.mark.long) for family in CHANGES],
)
def test_a_batch_chunks_prefix_hits_drafts_and_two_ranks_change_no_bit(family, build):
    directory = build(family)
    alone = logits(directory, ALONE, ROWS_ALONE)
    assert alone.shape == (4, VOCABULARY)
    assert alone.std() > 0.01
    assert torch.equal(logits(directory, beside(family == "qwen3_5_moe"), ROWS_BESIDE, size=2), alone)


def test_the_default_kernels_do_not_keep_the_bits(build):
    directory = build("qwen3_5_moe")
    alone, found = (
        logits(directory, plans, rows, deterministic=False)
        for plans, rows in ((ALONE[:1], ROWS_ALONE[:1]), (beside(recurrent=True)[:2], ROWS_BESIDE[:2]))
    )
    assert not torch.equal(alone, found)
    torch.testing.assert_close(alone, found, rtol=1e-4, atol=1e-5)
