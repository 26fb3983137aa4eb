"""Acceptance length tau of the tiny pair on held-out prompts, at T=0 and T=0.8, loops counted apart.

    python -m models.build.evaluate --target models/tiny/target --drafter models/tiny/drafter \
        --prompts build/prompts/held-out-code.jsonl

tau = tokens per target step (accepted + bonus). Because output does not depend on drafting, the target writes its text
first, on the project's own engine, and the drafter's blocks are then compared along it: the same figure as serving
gives. Steps that begin inside a
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
from models.build.continuations import LONGEST, Writer
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


Text = tuple[sequences.Prompt, list[int]]  # a prompt and what the target writes after it


def written(
    target: Path, stop: int, prompts: list[sequences.Prompt], new_tokens: int, temperature: float
) -> list[Text]:
    """The target's texts, cycles included, in the order of `prompts`; prompt i is sampled with seed i."""
    texts: dict[sequences.Prompt, list[int]] = {}
    writer = Writer(target, frozenset({stop}), concurrency=32)
    writer.run(prompts, new_tokens, temperature, 0, texts.__setitem__, through_cycles=True)
    return [(prompt, texts[prompt]) for prompt in prompts]


@torch.inference_mode()
def measure(target: TrainingTarget, drafter: DFlashModel, texts: list[Text]) -> Tau:
    counts = [0, 0, 0, 0]
    for prompt, text in texts:
        looping = in_loops(text)
        accepted = drafts_accepted(target, drafter, [*prompt.ids, *text], len(prompt.ids))
        position, last = 0, len(text) - 1
        while position < last:
            taken = min(accepted[position] + 1, last - position)
            outside = not looping[position]
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
        prompts = [prompt for prompt in prompts if len(prompt.ids) <= LONGEST - arguments.new_tokens]
        for temperature in (0.0, 0.8):
            texts = written(arguments.target, target.tokenizer.eos_token_id, prompts, arguments.new_tokens, temperature)
            tau = measure(target, drafter, texts)
            rows.append({"prompts": path.name, "temperature": temperature, **tau.row()})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
