"""The engine over a real, tiny Qwen3.5 MoE (Gated DeltaNet, attention, experts) says what transformers says."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cluster.contracts import EngineInfo, EngineRequest, SamplingParams
from tests.verifier_service.families.verdict import generate
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.test_engine import Inbox
from verifier_service.engine import Engine
from verifier_service.model.runner import TargetRunner
from verifier_service.proposers.plain import NoProposer
from verifier_service.scheduler import SchedulerLimits
from verifier_service.sequence import Progress

OUTPUT = 20
PROMPTS = [tuple(random.Random(i).randrange(250) for _ in range(length)) for i, length in enumerate((1, 3, 17, 40, 9))]


class Oracle(NoProposer):
    """Knows the reference text; drafts of it are right, wrong, or right up to a random point."""

    def __init__(self, texts: dict[str, list[int]], kind: str):
        self._texts, self._kind = texts, kind
        self._random = random.Random(3)
        self._ready: list[Progress] = []

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        self._ready = [p for p in progress if p.token_ids and not p.finish]

    def collect(self) -> float:
        for p in self._ready:
            text = self._texts[p.sequence.request.request_id]
            right = text[p.sequence.generated :][:6]
            upto = {"right": len(right), "wrong": 0, "partly": self._random.randrange(len(right) + 1)}[self._kind]
            p.sequence.drafts = tuple(t if i < upto else (t + 1) % 250 for i, t in enumerate(right))
        return 0.0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    directory = tmp_path_factory.mktemp("target")
    return directory, tiny_targets.build("qwen3_5_moe", directory)


def run(directory: Path, proposer, blocks: int = 60, step_tokens: int = 24, **changes) -> tuple[dict, dict]:
    """Outputs by request, and the counters."""
    torch.set_num_threads(1)
    limits = SchedulerLimits(slots=4, blocks=blocks, block_tokens=4, step_tokens=step_tokens, max_waiting=20)
    runner = TargetRunner(
        directory, num_blocks=blocks, block_tokens=4, num_slots=4, dtype=torch.float32, device="cpu", max_context=128
    )
    engine = Engine(runner, limits, EngineInfo("e", "f", 128, runner.shape.vocabulary, 4, 8), proposer=proposer)
    inbox = Inbox()
    for i, prompt in enumerate(PROMPTS):
        engine.submit(EngineRequest(f"r{i}", prompt, seed=i, max_new_tokens=OUTPUT, **changes), inbox)
    engine.start()
    inbox.wait(*(f"r{i}" for i in range(len(PROMPTS))))
    engine.stop()
    return {name: inbox.text(name) for name in inbox.deltas}, engine.status().counters


def test_greedy_output_without_drafts_equals_transformers_generate(target):
    outputs, _ = run(target[0], None)
    assert outputs == {f"r{i}": list(generate(target[1], prompt, OUTPUT)) for i, prompt in enumerate(PROMPTS)}


def test_seeded_output_is_the_same_with_drafts_and_without(target):
    sampling = SamplingParams(temperature=0.8, top_p=0.95)
    plain, _ = run(target[0], None, sampling=sampling)
    drafted, counters = run(target[0], Oracle(plain, "partly"), sampling=sampling)
    assert drafted == plain
    assert counters["accepted_tokens"] > 0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"repetition_penalty": 1.6}, {"sampling": SamplingParams(repetition_penalty=1.6)}),
        (
            {"sequence_bias": [[[17], 2.5], [[40], -100.0]], "repetition_penalty": 0.9},
            {"sampling": SamplingParams(repetition_penalty=0.9, logit_bias=((17, 2.5), (40, -100.0)))},
        ),
        (
            {"min_new_tokens": 9, "eos_token_id": list(range(0, 250, 3)), "repetition_penalty": 1.2},
            {
                "sampling": SamplingParams(repetition_penalty=1.2),
                "min_new_tokens": 9,
                "stop_token_ids": frozenset(range(0, 250, 3)),
            },
        ),
    ],
)
def test_greedy_output_with_processors_equals_transformers_generate_with_them(target, theirs, ours):
    expected = {}
    for i, prompt in enumerate(PROMPTS):
        fixed = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": OUTPUT}
        out = target[1].generate(torch.tensor([prompt]), **{**fixed, "eos_token_id": None, **theirs})
        expected[f"r{i}"] = out[0, len(prompt) :].tolist()
    outputs, counters = run(target[0], Oracle(expected, "partly"), **ours)
    assert outputs == expected
    assert counters["accepted_tokens"] > 0
