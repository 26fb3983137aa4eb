"""Acceptance length tau of the tiny pair on held-out prompts, at T=0 and T=0.8, loops counted apart.

    python -m models.build.evaluate --target models/tiny/target --drafter models/tiny/drafter \
        --prompts build/prompts/held-out-code.jsonl

tau = tokens per target step (accepted + bonus). Because output does not depend on drafting, the target writes its text
first and the drafter's blocks are then compared along it: the same figure as serving gives. Steps that begin inside a
repeated cycle (`paceline.bench.loops`) are left out of "tau outside loops"; loop_share is their share of the tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from drafter_service.model import DFlashModel
from drafter_service.training import sequences
from drafter_service.training.objective import block_hidden
from drafter_service.training.target import TrainingTarget
from paceline.bench.loops import in_loops


@dataclass(frozen=True)
class Tau:
    """Counts over all prompts. steps and tokens outside loops; all_*: loops included."""

    steps: int
    tokens: int
    all_steps: int
    all_tokens: int

    def row(self) -> dict[str, float]:
        return {
            "tau_outside_loops": round(self.tokens / max(1, self.steps), 3),
            "tau_with_loops": round(self.all_tokens / max(1, self.all_steps), 3),
            "loop_share": round(1 - self.tokens / max(1, self.all_tokens), 3),
            "tokens": self.all_tokens,
        }


@torch.inference_mode()
def measure(
    target: TrainingTarget, drafter: DFlashModel, prompts: list[sequences.Prompt], new_tokens: int, temperature: float
) -> Tau:
    counts = [0, 0, 0, 0]
    by_length: dict[int, list[sequences.Prompt]] = {}
    for prompt in prompts:
        by_length.setdefault(len(prompt.ids), []).append(prompt)
    for length, group in sorted(by_length.items()):
        ids = torch.tensor([prompt.ids for prompt in group])
        for row in target.generate(ids, new_tokens, temperature):
            end = target.end_of_answer(row, length)
            looping = in_loops(row[length:end])
            accepted = drafts_accepted(target, drafter, row[:end], length)
            position = length
            while position < end - 1:
                taken = min(accepted[position - length] + 1, end - 1 - position)
                outside = not looping[position - length]
                counts[0] += outside
                counts[1] += taken * outside
                counts[2] += 1
                counts[3] += taken
                position += taken
    return Tau(*counts)


def drafts_accepted(target: TrainingTarget, drafter: DFlashModel, row: list[int], start: int) -> list[int]:
    """For a block anchored at each position start .. len-2 of `row`: how many of its drafts equal the row's tokens."""
    ids = torch.tensor([row])
    anchors = torch.arange(start, max(start, len(row) - 1))[None]
    if anchors.numel() == 0:
        return []
    taps = target.taps(ids, drafter.dflash.target_layer_ids).float()
    hidden = block_hidden(drafter, target.embedding, taps, ids, torch.tensor([len(row)]), anchors)
    drafts = target.head(hidden).argmax(-1)[0]
    positions = anchors[0][:, None] + torch.arange(1, drafter.dflash.block_size)
    right = (ids[0][positions.clamp(max=len(row) - 1)] == drafts) & (positions < len(row))
    return right.int().cumprod(1).sum(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("models/tiny/target"))
    parser.add_argument("--drafter", type=Path, default=Path("models/tiny/drafter"))
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=96, help="prompts of each file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target = TrainingTarget(arguments.target, torch.float32, "cpu")
    drafter = DFlashModel.load(arguments.drafter, torch.float32)
    rows = []
    for path in arguments.prompts:
        prompts = sequences.read(path, target.tokenizer)[0][: arguments.limit]
        room = target.config.max_position_embeddings - arguments.new_tokens
        prompts = [prompt for prompt in prompts if len(prompt.ids) <= room]
        for temperature in (0.0, 0.8):
            torch.manual_seed(0)
            tau = measure(target, drafter, prompts, arguments.new_tokens, temperature)
            rows.append({"prompts": path.name, "temperature": temperature, **tau.row()})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
