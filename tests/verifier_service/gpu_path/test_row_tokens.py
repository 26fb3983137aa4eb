"""Over kernels a row's token is its own affair: it has none of its logits made unless it needs them, nor by others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.contracts import EngineInfo, EngineRequest, SamplingParams
from modeling.kernel_head import TritonHead
from modeling.kernel_operations import DeterministicTritonOperations, TritonOperations
from modeling.parallel import VocabularyHead
from modeling.ranks import RankGroup
from tests.kernels.products import sum_products_in_order
from tests.verifier_service.gpu_path.tiny import OVERRIDES, TinyTarget
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.schedules import BLOCK_TOKENS, BLOCKS, SLOTS
from tests.verifier_service.oracle import PartlyRight
from tests.verifier_service.test_engine import Inbox
from verifier_service.engine import Engine
from verifier_service.model.device.shard_sampling import ShardSampling
from verifier_service.model.runner import TargetRunner
from verifier_service.plan import RowDraw, ShownRows
from verifier_service.sampling.draw import every_row
from verifier_service.sampling.kernel_draw import draw_by_kernels
from verifier_service.scheduler import SchedulerLimits

PARAMS = {
    "greedy": SamplingParams(),
    "seeded": SamplingParams(temperature=0.9),
    "top_p": SamplingParams(temperature=1.5, top_p=0.8),
    "min_p": SamplingParams(temperature=1.5, min_p=0.3),
    "penalised": SamplingParams(temperature=0.9, frequency_penalty=0.5),
}
ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
PROMPT = (5, 6, 7)


@pytest.mark.parametrize(
    ("kinds", "logits"),
    [
        (("greedy", "seeded", "greedy"), []),
        (("top_p", "greedy", "min_p", "seeded", "seeded"), [2]),
        (("top_p", "min_p"), [2]),
    ],
)
def test_logits_are_made_for_truncated_rows_alone_and_the_tokens_are_those_of_all_logits(
    kinds: Sequence[str], logits: list[int], monkeypatch: pytest.MonkeyPatch
):
    head = VocabularyHead(torch.randn(201, 70) / 4, 201, RankGroup(), TritonOperations())
    hidden = torch.randn(len(kinds), 70)
    draws = [RowDraw(at, 1, 7 + at, at - 3, at, PARAMS[kind]) for at, kind in enumerate(kinds) if kind != "greedy"]
    want = draw_by_kernels(head.own(hidden), every_row(draws, len(hidden)))
    made, multiply = [], TritonHead.__call__

    def noted(self: TritonHead, some: torch.Tensor) -> torch.Tensor:
        made.append(len(some))
        return multiply(self, some)

    monkeypatch.setattr(TritonHead, "__call__", noted)
    assert ShardSampling(head).take(hidden, draws).tolist() == want.tolist()
    assert made == logits


def test_rows_whose_tokens_are_others_to_take_are_left_out(monkeypatch: pytest.MonkeyPatch):
    head = VocabularyHead(torch.randn(64, 16), 64, RankGroup(), TritonOperations())
    hidden, raced, race = torch.randn(5, 16), [], TritonHead.race

    def noted(self: TritonHead, some: torch.Tensor, *rest: Any) -> Any:
        raced.append(len(some))
        return race(self, some, *rest)

    monkeypatch.setattr(TritonHead, "race", noted)
    alone = ShardSampling(head).take(hidden, ())
    tokens = ShardSampling(head).take(hidden, (), [ShownRows(0, 1, True), ShownRows(3, 2, True)])
    assert tokens[1:3].tolist() == alone[1:3].tolist()
    assert ShardSampling(head).take(hidden, (), [ShownRows(0, 5, True)]).shape == (5,)
    assert raced == [5, 2]


@pytest.mark.parametrize("operations", [TritonOperations(), DeterministicTritonOperations(torch.float32, device="cpu")])
def test_what_decides_a_row_are_the_bits_that_its_logits_have_beside_any_number_of_others(
    operations: TritonOperations, monkeypatch: pytest.MonkeyPatch
):
    sum_products_in_order(monkeypatch)
    weight, hidden = torch.randn(140, 70), torch.randn(70, 70)
    own = VocabularyHead(weight, 140, RankGroup(), operations)
    shard = VocabularyHead(weight[64:], 76, RankGroup(), operations)
    logits = own.own(hidden)
    assert torch.equal(shard.own(hidden[:2]), logits[:2, 64:])
    assert isinstance(own.multiply, TritonHead)
    for rows in (slice(3, 4), slice(0, 70)):
        greedy = torch.zeros_like(hidden[rows, 0], dtype=torch.int64), torch.zeros(len(hidden[rows])).double()
        assert torch.equal(own.multiply.race(hidden[rows], *greedy, 0)[1], logits[rows].amax(-1).double())


def texts(
    runner: TargetRunner, kinds: Sequence[str], known: dict[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """known: drafts are partly right parts of these."""
    shape = runner.shape
    limits = SchedulerLimits(slots=SLOTS, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, step_tokens=20, max_waiting=9)
    info = EngineInfo("e", "f", shape.max_context, shape.vocabulary, SLOTS, 4)
    proposer = PartlyRight(known, 200, longest=3) if known else None
    engine = Engine(runner, limits, info, proposer=proposer)
    inbox = Inbox()
    for kind in kinds:
        engine.submit(EngineRequest(kind, PROMPT, seed=2**64 - 9, max_new_tokens=4, sampling=PARAMS[kind]), inbox)
    engine.start()
    with mock.patch("tests.verifier_service.test_engine.WAIT_S", 60.0):
        inbox.wait(*kinds)
    engine.stop()
    return {kind: inbox.text(kind) for kind in kinds}


def test_texts_are_those_over_torch_and_transformers_own_whoever_is_in_the_batch(tmp_path: Path):
    tiny_targets.build("qwen3", tmp_path, **{**OVERRIDES["qwen3"], **ONE_LAYER})
    target = TinyTarget(tmp_path, [], None)  # type: ignore[arg-type]  # no schedule is run
    want = texts(target.runner("torch"), list(PARAMS))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    stock = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, min_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert want["greedy"] == stock[0, len(PROMPT) :].tolist()
    runner = target.runner()
    assert runner.shape.draws
    assert texts(runner, list(PARAMS)[1:], want) == {kind: want[kind] for kind in list(PARAMS)[1:]}
    assert texts(runner, ["greedy", "seeded"]) == {kind: want[kind] for kind in ("greedy", "seeded")}
