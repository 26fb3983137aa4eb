"""Put training sets together from the target's continuations: those long enough to teach something, shuffled.

    python -m models.build.select --greedy build/own-greedy.jsonl --sampled build/own-sampled.jsonl \
        --windows build/prompts/corpus.jsonl --out build/prompts

Writes OUT/greedy.jsonl (greedy continuations only), OUT/mixed.jsonl (sampled ones too) and OUT/long.jsonl (those and
1200 windows of real text).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from transformers import AutoTokenizer

from drafter_service.training import sequences

SHORTEST = 24  # tokens of a continuation
WINDOWS = 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("models/tiny/target"))
    parser.add_argument("--greedy", type=Path, required=True)
    parser.add_argument("--sampled", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/prompts"))
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.target, local_files_only=True)
    read = {name: sequences.read(getattr(arguments, name), tokenizer)[1] for name in ("greedy", "sampled", "windows")}
    greedy, sampled = (long_enough(read[name]) for name in ("greedy", "sampled"))
    sets = {"greedy": greedy, "mixed": greedy + sampled, "long": greedy + sampled + read["windows"][:WINDOWS]}
    for name, chosen in sets.items():
        sequences.write(arguments.out / f"{name}.jsonl", shuffled(chosen))
        print(f"{name}: {len(chosen)} sequences")


def long_enough(found: list[sequences.TrainingSequence]) -> list[sequences.TrainingSequence]:
    return [sequence for sequence in found if len(sequence.ids) - sequence.answer_start >= SHORTEST]


def shuffled(found: list[sequences.TrainingSequence]) -> list[sequences.TrainingSequence]:
    """The same order however the file came about: continuations are written in the order in which they end."""
    return random.Random(0).sample(sorted(found, key=lambda sequence: sequence.ids), len(found))


if __name__ == "__main__":
    main()
