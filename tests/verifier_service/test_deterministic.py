"""Deterministic mode: text and log probabilities are the same to the bit, whatever the engine did to get them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from cluster.contracts import EngineInfo, EngineRequest, SamplingParams, TokenLogprobs
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.packed_targets import TARGETS
from tests.verifier_service.model.schedules import BLOCK_TOKENS, BLOCKS, SLOTS, schedule, sequences
from tests.verifier_service.oracle import PartlyRight
from tests.verifier_service.test_engine import Inbox
from verifier_service.config import VerifierSettings
from verifier_service.engine import Engine
from verifier_service.model.runner import TargetRunner
from verifier_service.plan import StepPlan, VerifyRow
from verifier_service.scheduler import SchedulerLimits

OUTPUT = 24
PROMPTS = [tuple(random.Random(i).choices(range(250), k=count)) for i, count in enumerate((1, 30, 61, 12))]
SAMPLING = (
    SamplingParams(logprobs=3),
    SamplingParams(temperature=0.9, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=40, logprobs=0),
    SamplingParams(temperature=1.1, min_p=0.02, presence_penalty=0.5, logprobs=1),
)
Said = dict[str, tuple[list[int], list[TokenLogprobs]]]


class Dying(PartlyRight):
    """Is right in part, and fails for good in the middle of it all."""

    steps = 0

    def collect(self) -> float:
        self.steps += 1
        if self.steps > 4:
            raise ConnectionError("the drafter is gone")
        return super().collect()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention, Gated DeltaNet, experts and a shared expert."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("target")
    tiny_targets.build("qwen3_5_moe", directory)
    return directory


def said(target: Path, proposer=None, *, deterministic: bool = True, slots: int = 4, blocks: int = 120) -> Said:
    """Text and log probabilities of every request."""
    limits = SchedulerLimits(slots=slots, blocks=blocks, block_tokens=4, step_tokens=28, max_waiting=20)
    runner = TargetRunner(
        target,
        num_blocks=blocks,
        block_tokens=4,
        num_slots=slots,
        dtype=torch.float32,
        device="cpu",
        max_context=128,
        deterministic=deterministic,
    )
    engine = Engine(runner, limits, EngineInfo("e", "f", 128, runner.shape.vocabulary, slots, 8), proposer=proposer)
    inbox = Inbox()
    names = [f"r{i}" for i in range(len(PROMPTS))]
    for name, prompt, sampling in zip(names, PROMPTS, SAMPLING, strict=True):
        engine.submit(EngineRequest(name, prompt, seed=7, max_new_tokens=OUTPUT, sampling=sampling), inbox)
    engine.start()
    inbox.wait(*names)
    engine.stop()
    if blocks < 120:
        assert engine.status().counters["preemptions"] > 0
    if proposer is not None:
        assert engine.status().counters["accepted_tokens"] > 0
    return {
        name: (inbox.text(name), [one for delta in inbox.deltas[name] for one in delta.logprobs or ()])
        for name in names
    }


@pytest.fixture(scope="module")
def alone(target: Path) -> Said:
    """One request after the other, without drafts."""
    return said(target, slots=1)


def drafts(alone: Said, kind: type[PartlyRight] = PartlyRight) -> PartlyRight:
    return kind({name: text for name, (text, _) in alone.items()}, 250)


def test_a_batch_says_what_each_request_says_alone(target, alone):
    assert all(len(text) == len(logprobs) == OUTPUT for text, logprobs in alone.values())
    assert said(target) == alone


def test_drafts_change_no_bit(target, alone):
    assert said(target, drafts(alone)) == alone


def test_a_drafter_that_dies_in_the_middle_changes_no_bit(target, alone):
    assert said(target, drafts(alone, Dying)) == alone


def test_preemption_and_resuming_change_no_bit(target, alone):
    assert said(target, drafts(alone), blocks=40) == alone


def test_the_default_mode_keeps_the_text_but_not_the_bits(target, alone):
    fast = said(target, drafts(alone), deterministic=False)
    assert {name: text for name, (text, _) in fast.items()} == {name: text for name, (text, _) in alone.items()}
    assert fast != said(target, deterministic=False, slots=1)


@pytest.mark.parametrize(
    ("name", "overrides", "changes"),
    [
        *((name, {}, {}) for name in TARGETS),
        ("qwen3_5_moe", {}, {"dtype": torch.bfloat16}),
        ("gpt_oss", {}, {"kv_dtype": "float8_e4m3"}),
        ("deepseek_v3", {}, {"kv_dtype": "float8_e4m3"}),
        ("qwen3_5", {"num_attention_heads": 1, "num_key_value_heads": 1}, {}),  # an output gate of 16 entries
        ("qwen3_5_moe", {"moe_intermediate_size": 40, "linear_num_value_heads": 4}, {}),
    ],
)
def test_packed_weights_lower_precision_and_odd_widths_are_no_exception(name, overrides, changes, tmp_path):
    if name in TARGETS:
        TARGETS[name].build(tmp_path)
    else:
        tiny_targets.build(name, tmp_path, **overrides)
    texts = sequences(2, tiny_targets.VOCABULARY, seed=2)
    known: dict[tuple[int, int], torch.Tensor] = {}
    compared = 0
    for seed, longest in ((0, 6), (1, 3)):
        settings = {"dtype": torch.float32, "deterministic": True, "device": "cpu", **changes}
        runner = TargetRunner(tmp_path, num_blocks=BLOCKS, block_tokens=BLOCK_TOKENS, num_slots=SLOTS, **settings)
        for step in schedule(texts, tiny_targets.VOCABULARY, seed=seed, longest_block=longest):
            logits = runner.forward(step.plan).logits
            assert logits is not None
            for cell in step.logits:
                place = cell.sequence, cell.position
                compared += place in known
                assert torch.equal(known.setdefault(place, logits[cell.row].clone()), logits[cell.row])
    assert compared > 20


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_steps_of_many_tokens_are_no_exception(family, tmp_path):
    tiny_targets.build(family, tmp_path)
    text = random.Random(5).choices(range(tiny_targets.VOCABULARY), k=64)

    def logits(slots: int, tokens: int) -> torch.Tensor:
        """Of the whole text, `tokens` in a row of each slot and step."""
        runner = TargetRunner(
            tmp_path,
            num_blocks=16 * slots,
            block_tokens=4,
            num_slots=slots,
            dtype=torch.float32,
            device="cpu",
            deterministic=True,
        )
        blocks = tuple((slot, 16 * slot + block) for slot in range(slots) for block in range(16))
        kept: list[torch.Tensor] = []
        for start in range(0, len(text), tokens):
            rows = tuple(VerifyRow(slot, start, tuple(text[start : start + tokens])) for slot in range(slots))
            decided = tuple((slot, tokens) for slot in range(slots if start else 0))
            output = runner.forward(StepPlan(start, rows, new_blocks=() if start else blocks, decided=decided)).logits
            assert output is not None
            kept.append(output.view(slots, tokens, -1))
        return torch.cat(kept, dim=1)

    alone = logits(1, 1)
    for slots, tokens in ((1, 8), (8, 8), (3, 16), (5, 64)):
        assert torch.equal(logits(slots, tokens), alone.expand(slots, -1, -1)), (slots, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda", "kernels": "torch"}, "device is 'cuda' and kernels 'torch', .*: set kernels to 'auto'"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size is 3: .* choose one of 1, 2, 4, 8"),
        ({"tensor_parallel_size": 16}, "tensor_parallel_size is 16: .* choose one of 1, 2, 4, 8"),
        ({"threads_per_rank": 2}, "threads_per_rank is 2: .* set it to 1"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_cure(changes, message):
    settings = {"target": "t", "device": "cpu", "speculation": {"mode": "none"}}
    for can in ({}, {"device": "cuda"}, {"kernels": "triton"}, {"device": "cuda", "threads_per_rank": 2}):
        VerifierSettings.model_validate({**settings, "deterministic": True, **can})
    VerifierSettings.model_validate({**settings, **changes})
    with pytest.raises(ValidationError, match=message):
        VerifierSettings.model_validate({**settings, "deterministic": True, **changes})
