"""Prompts for the drafter's training, and the held-out sets for its evaluation, as JSON lines of token ids.

    python -m models.build.prompts --target models/tiny/target --out build/prompts

Code prompts start at the beginning of a line and have one of a few lengths; chat prompts ask for documented functions,
in the chat template; stub prompts are functions to complete (`models.build.stubs`), as code and in chats. All of the
training side. They are split at random into train.jsonl, sampled.jsonl (to be continued at a temperature) and
dev-{code,chats,stubs}.jsonl (training side too, but not trained on: to choose between runs).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import Tokenizer

from models.build import corpus, stubs
from models.build import tokenizer as tokens

LENGTHS = (12, 16, 24, 32, 48, 64)
SEED = 5
DEV = 48  # prompts of each kind


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
    return [_chat(tokenizer, request) for request, _ in chosen]


def stub_prompts(tokenizer: Tokenizer, held_out: bool, count: int, in_chats: bool) -> list[list[int]]:
    """`count` functions to complete, as code or as requests in chats; of all documented functions in turn."""
    rng = random.Random(2 * SEED + held_out + in_chats)
    functions = stubs.documented(held_out)
    prompts: list[list[int]] = []
    while len(prompts) < count:
        for function in rng.sample(functions, min(len(functions), count - len(prompts))):
            code = stubs.stub(function, rng)
            request = stubs.request(code, rng) if in_chats else ""
            prompts.append(_chat(tokenizer, request) if in_chats else tokenizer.encode(code).ids)
    return prompts


def _chat(tokenizer: Tokenizer, request: str) -> list[int]:
    text = f"{tokens.IM_START}user\n{request}{tokens.IM_END}\n{tokens.IM_START}assistant\n"
    return tokenizer.encode(text).ids


def inside_fence(tokenizer: Tokenizer, path: Path) -> list[list[int]]:
    """The code between ```python and ``` of each {"turns": [request]} line, as a prompt to complete without a chat."""
    requests = [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    codes = [request.split("```python\n", 1)[1].rsplit("```", 1)[0].strip("\n") + "\n" for request in requests]
    return [tokenizer.encode(code).ids for code in codes]


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
    parser.add_argument("--code", type=int, default=4500)
    parser.add_argument("--further-code", type=int, default=4500, help="code prompts after those, all in train.jsonl")
    parser.add_argument("--chats", type=int, default=1500)
    parser.add_argument("--stubs", type=int, default=2700)
    parser.add_argument("--stub-chats", type=int, default=4000)
    parser.add_argument("--windows", type=int, default=12000)
    parser.add_argument("--fenced", type=Path, help="requests with code in a fence; writes OUT/fenced.jsonl only")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.target / "tokenizer.json"))
    out = arguments.out
    if arguments.fenced:
        save(out / "fenced.jsonl", inside_fence(tokenizer, arguments.fenced))
        return
    groups = {
        "code": code_prompts(tokenizer, False, arguments.code),
        "chats": chat_prompts(tokenizer, False, arguments.chats),
        "stubs": stub_prompts(tokenizer, False, arguments.stubs, in_chats=False),
        "stub-chats": stub_prompts(tokenizer, False, arguments.stub_chats, in_chats=True),
    }
    rng = random.Random(SEED)
    train: list[list[int]] = []
    for name, prompts in groups.items():
        rng.shuffle(prompts)
        save(out / f"dev-{name}.jsonl", prompts[:DEV])
        train += prompts[DEV:]
    rng.shuffle(train)
    sampled = len(train) // 4
    save(out / "sampled.jsonl", train[:sampled])
    further = code_prompts(tokenizer, False, arguments.code + arguments.further_code)[arguments.code :]
    save(out / "train.jsonl", train[sampled:] + further)
    lines = [{"prompt_ids": ids[:4], "completion_ids": ids[4:]} for ids in windows(tokenizer, arguments.windows)]
    (out / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save(out / "held-out-code.jsonl", code_prompts(tokenizer, True, 96))
    save(out / "held-out-chats.jsonl", chat_prompts(tokenizer, True, 48))


if __name__ == "__main__":
    main()
