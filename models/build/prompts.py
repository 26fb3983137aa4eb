"""Prompts for the drafter's training, and the held-out sets for its evaluation, as JSON lines of token ids.

    python -m models.build.prompts --target models/tiny/target --out build/prompts

Code prompts start at the beginning of a line and have one of a few lengths, so that the target can continue many at
once; chat prompts ask for documented functions of the training side, in the chat template.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import Tokenizer

from models.build import corpus
from models.build import tokenizer as tokens

LENGTHS = (12, 16, 24, 32, 48, 64)
SEED = 5


def code_prompts(tokenizer: Tokenizer, held_out: bool, count: int, starts: tuple[str, ...] = ()) -> list[list[int]]:
    """`count` prompts cut from files, each beginning at a line (one of `starts`, if given) chosen at random."""
    rng = random.Random(SEED + held_out)
    documents = [text.splitlines(keepends=True) for text in corpus.texts(held_out)]
    weights = [len(lines) for lines in documents]
    prompts: list[list[int]] = []
    while len(prompts) < count:
        (lines,) = rng.choices(documents, weights)
        if not lines:
            continue
        first = rng.randrange(len(lines))
        if starts and not lines[first].lstrip().startswith(starts):
            continue
        ids = tokenizer.encode("".join(lines[first : first + 30])).ids
        length = rng.choice(LENGTHS)
        if len(ids) >= length:
            prompts.append(ids[:length])
    return prompts


def chat_prompts(tokenizer: Tokenizer, held_out: bool, count: int) -> list[list[int]]:
    rng = random.Random(SEED + held_out)
    pairs = corpus.chats(held_out)
    chosen = rng.sample(pairs, min(count, len(pairs)))
    opening = f"{tokens.IM_START}assistant\n"
    return [
        tokenizer.encode(f"{tokens.IM_START}user\n{request}{tokens.IM_END}\n{opening}").ids for request, _ in chosen
    ]


def windows(tokenizer: Tokenizer, count: int, length: int = 192) -> list[list[int]]:
    """Real text of the training side: what the drafter learns the language from before it meets the target's own."""
    rng = random.Random(SEED)
    documents = [ids for ids in (tokenizer.encode(text).ids for text in corpus.texts(False)) if len(ids) > length]
    weights = [len(ids) - length for ids in documents]
    chosen = rng.choices(documents, weights, k=count)
    return [ids[first : first + length] for ids in chosen for first in [rng.randrange(len(ids) - length)]]


def save(path: Path, prompts: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=Path("models/tiny/target"))
    parser.add_argument("--out", type=Path, default=Path("build/prompts"))
    parser.add_argument("--code", type=int, default=9000)
    parser.add_argument("--chats", type=int, default=1200)
    parser.add_argument("--windows", type=int, default=12000)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.target / "tokenizer.json"))
    train = code_prompts(tokenizer, False, arguments.code) + chat_prompts(tokenizer, False, arguments.chats)
    save(arguments.out / "train.jsonl", train)
    lines = [{"prompt_ids": ids[:4], "completion_ids": ids[4:]} for ids in windows(tokenizer, arguments.windows)]
    (arguments.out / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save(arguments.out / "held-out-code.jsonl", code_prompts(tokenizer, True, 96))
    save(arguments.out / "held-out-chats.jsonl", chat_prompts(tokenizer, True, 48))


if __name__ == "__main__":
    main()
