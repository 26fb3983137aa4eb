"""The engine writes the training text: the target's own, until it stops or begins to cycle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from drafter_service.training import sequences
from drafter_service.training.target import TrainingTarget
from models.build import continuations, evaluate

TARGET = Path(__file__).parents[2] / "models/tiny/target"
PROMPTS = ("def read(self, size):\n", "class Queue:\n", "import os\n", "for key, value in items:\n")


@pytest.fixture(scope="module")
def target() -> TrainingTarget:
    torch.set_num_threads(1)
    return TrainingTarget(TARGET, torch.float32, "cpu")


def test_a_continuation_is_the_targets_greedy_text_and_an_interrupted_run_goes_on(target, tmp_path, monkeypatch):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "own.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    read = sequences.read(prompts, target.tokenizer)[0]
    expected = {s for batch in target.continue_prompts(read, 40, 0.0, 4) for s in batch}
    options = ["--target", str(TARGET), "--prompts", str(prompts), "--out", str(out), "--new-tokens", "40"]
    monkeypatch.setattr(sys, "argv", ["continuations", *options, "--concurrency", "2"])
    continuations.main()
    assert set(sequences.read(out, target.tokenizer)[1]) == expected
    first, *rest = out.read_text().splitlines(keepends=True)
    out.write_text(first)
    continuations.main()
    again = out.read_text().splitlines(keepends=True)
    assert again[0] == first
    assert sorted(again[1:]) == sorted(rest)


def test_text_to_evaluate_goes_on_where_it_repeats_itself_and_keeps_the_order_of_prompts(target):
    prompts = [sequences.Prompt(tuple(target.tokenizer(text)["input_ids"])) for text in PROMPTS]
    texts = evaluate.written(TARGET, target.tokenizer.eos_token_id, prompts, 80, 0.0)
    assert [prompt for prompt, _ in texts] == prompts
    assert any(sequences.cut_cycle(text, 0) < len(text) - 8 for _, text in texts)
    for prompt, text in texts:
        (row,) = target.generate(torch.tensor([prompt.ids]), 80, 0.0)
        assert text == row[len(prompt.ids) : target.end_of_answer(row, len(prompt.ids))]
