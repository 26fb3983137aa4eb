"""Choose training sequences: the target's longer continuations, and those of them that are its greedy text.

    python -m models.build.select --target models/tiny/target --data build/own/continuations.jsonl \
        --windows build/prompts/corpus.jsonl --out build/prompts

Writes OUT/long.jsonl (continuations of at least 40 tokens before a cycle, and 1200 windows of real text) and
OUT/greedy.jsonl (continuations of at least 32 tokens that are the argmax of the target nearly everywhere).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

from drafter_service.training import sequences
from drafter_service.training.target import TrainingTarget
from drafter_service.training.trainer import collate

BATCH = 32
GREEDY = 0.985  # padding and batch shape move a few near-ties


@torch.inference_mode()
def greedy_share(target: TrainingTarget, batch: list[sequences.TrainingSequence]) -> list[float]:
    """For each sequence: the share of its answer's tokens that are the target's argmax, teacher-forced."""
    ids, lengths, starts = collate(batch, max(len(sequence.ids) for sequence in batch))
    best = target.model(input_ids=ids).logits.argmax(-1)
    pairs = zip(ids, best, lengths.tolist(), starts.tolist())
    return [(guess[start - 1 : end - 1] == row[start:end]).float().mean().item() for row, guess, end, start in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("models/tiny/target"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/prompts"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = TrainingTarget(arguments.target, torch.float32, "cpu")
    own = sequences.read(arguments.data, target.tokenizer)[1]
    real = sequences.read(arguments.windows, target.tokenizer)[1][:1200]
    sequences.write(arguments.out / "long.jsonl", [s for s in own if len(s.ids) - s.answer_start >= 40] + real)
    candidates = sorted((s for s in own if len(s.ids) - s.answer_start >= 32), key=lambda s: len(s.ids))
    greedy = []
    for first in range(0, len(candidates), BATCH):
        batch = candidates[first : first + BATCH]
        greedy += [s for s, share in zip(batch, greedy_share(target, batch)) if share > GREEDY]
    random.Random(0).shuffle(greedy)
    sequences.write(arguments.out / "greedy.jsonl", greedy)
    print(f"{len(own)} continuations, {len(greedy)} of them greedy")


if __name__ == "__main__":
    main()
