"""The engine writes the training text: the target's own, until it stops or begins to cycle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from drafter_service.training import sequences
from drafter_service.training.target import TrainingTarget
from models.build import continuations

TARGET = Path(__file__).parents[2] / "models/tiny/target"
PROMPTS = ("def read(self, size):\n", "class Queue:\n", "import os\n", "for key, value in items:\n")


def test_a_continuation_is_the_targets_greedy_text_and_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    target = TrainingTarget(TARGET, torch.float32, "cpu")
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
