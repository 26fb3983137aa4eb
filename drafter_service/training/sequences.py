"""Training sequences: a prompt and the target's own continuation of it, as token ids.

A data file is JSON lines of any of: {"prompt": text}, {"turns": [user message, ...]} (the first is rendered with the
target's chat template), {"prompt_ids": [...]}; with "completion_ids": [...] beside them the line is used as it is,
without them the target writes the completion (see `continuations`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A data file that cannot be used: names the file, the line and the cure."""


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TrainingSequence:
    """ids: prompt and completion; a block may be anchored at positions >= answer_start - 1."""

    ids: tuple[int, ...]
    answer_start: int


def read(path: Path, tokenizer: Any) -> tuple[list[Prompt], list[TrainingSequence]]:
    """Prompts still to be continued, and finished sequences. `tokenizer`: a transformers tokenizer. Raises
    DataError."""
    if not path.is_file():
        raise DataError(f"--data {str(path)!r} does not exist: give a JSON-lines file of prompts")
    prompts: list[Prompt] = []
    sequences: list[TrainingSequence] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        ids, completion = _parse(line, f"{path} line {number}", tokenizer)
        if completion is None:
            prompts.append(Prompt(ids))
        else:
            sequences.append(TrainingSequence(ids + completion, len(ids)))
    if not prompts and not sequences:
        raise DataError(f"--data {str(path)!r} holds no line: give a JSON-lines file of prompts")
    return prompts, sequences


def write(path: Path, sequences: Iterable[TrainingSequence]) -> None:
    """The inverse of `read` for finished sequences; replaces the file at once."""
    fresh = path.with_suffix(path.suffix + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        for sequence in sequences:
            start = sequence.answer_start
            file.write(json.dumps({"prompt_ids": sequence.ids[:start], "completion_ids": sequence.ids[start:]}) + "\n")
    fresh.replace(path)


def cut_cycle(ids: Sequence[int], start: int, longest_period: int = 16, repeats: int = 3) -> int:
    """End of `ids` without a closing cycle: where, from `start` on, a period of at most `longest_period` tokens has
    been repeated `repeats` times; len(ids) if it never is. Small models loop, and loops teach a drafter nothing."""
    runs = [0] * (longest_period + 1)
    for position in range(start, len(ids)):
        for period in range(1, longest_period + 1):
            same = position - period >= start and ids[position] == ids[position - period]
            runs[period] = runs[period] + 1 if same else 0
            if runs[period] >= period * (repeats - 1):
                return position + 1
    return len(ids)


def _parse(line: str, where: str, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, not {type(entry).__name__}")
    if "prompt_ids" in entry:
        ids = entry["prompt_ids"]
    elif isinstance(entry.get("prompt"), str):
        ids = tokenizer(entry["prompt"], add_special_tokens=False)["input_ids"]
    elif entry.get("turns"):
        messages = [{"role": "user", "content": entry["turns"][0]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        raise DataError(f"{where}: none of 'prompt', 'turns', 'prompt_ids' is there; found {sorted(entry)}")
    if not ids:
        raise DataError(f"{where}: the prompt is empty")
    completion = entry.get("completion_ids")
    return tuple(ids), None if completion is None else tuple(completion)
