"""Prompts of a benchmark: JSON lines, read once, rendered for an engine (token ids) or sent as they are (HTTP).

A line is one of {"prompt": text}, {"turns": [user message, ...]} (the first is used, as a chat) or
{"prompt_ids": [...]}; other keys are ignored, so that the public prompt sets can be used as they come.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.bench.errors import BenchError

SHIPPED = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    """Exactly one of the three is set. message: a user's, for the chat template."""

    text: str | None = None
    message: str | None = None
    ids: tuple[int, ...] | None = None

    def render(self, tokenizer: Any) -> tuple[int, ...]:
        """Token ids for a transformers tokenizer. Raises BenchError if there is no chat template for a message."""
        if self.ids is not None:
            return self.ids
        text = self.text
        if text is None:
            if not getattr(tokenizer, "chat_template", None):
                raise BenchError("--prompts has {turns}, but the target's tokenizer has no chat template: use {prompt}")
            messages = [{"role": "user", "content": self.message}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def read(path: Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a file. Raises BenchError that names the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--prompts {path}: cannot be read ({error}): give a JSON-lines file") from error
    prompts = [_parse(line, f"--prompts {path} line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise BenchError(f"--prompts {path} holds no prompt: give a JSON-lines file with one or more")
    return prompts[:limit]


def fit(prompts: list[Prompt], tokenizer: Any, max_tokens: int, max_context: int) -> tuple[list[tuple[int, ...]], int]:
    """Rendered prompts that leave room for max_tokens, and how many did not. Raises BenchError if none does."""
    rendered = [prompt.render(tokenizer) for prompt in prompts]
    kept = [ids for ids in rendered if ids and len(ids) + max_tokens <= max_context]
    if not kept:
        raise BenchError(
            f"--max-tokens is {max_tokens} and the target's context {max_context}: no prompt fits beside it, lower it"
        )
    return kept, len(rendered) - len(kept)


def _parse(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise BenchError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise BenchError(f"{where}: expected an object, found {type(entry).__name__}")
    match entry:
        case {"prompt_ids": [int(), *_] as ids} if all(type(i) is int for i in ids):
            return Prompt(ids=tuple(ids))
        case {"prompt": str(text)} if text:
            return Prompt(text=text)
        case {"turns": [str(message), *_]} if message:
            return Prompt(message=message)
    raise BenchError(
        f'{where}: expected {{"prompt": text}}, {{"turns": [text, ...]}} or {{"prompt_ids": [int, ...]}}, '
        f"none empty; found the keys {sorted(entry)}"
    )
