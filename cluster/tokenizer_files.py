"""What a checkpoint's files say about its tokens: the tokenizer, special tokens, ends of generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cluster import tiktoken_file
from cluster.errors import ConfigError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Of tokenizer.json, or else of tiktoken.model; neither pads nor cuts. Raises ConfigError: the file, the cure.

    The file is taken as it is: transformers' AutoTokenizer rebuilds parts of it from the model's type.
    """
    file, ranks = directory / "tokenizer.json", directory / tiktoken_file.FILE
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file} is no tokenizer: {error}") from error
    elif ranks.is_file():
        tokenizer = tiktoken_file.read_tiktoken(ranks, read_json(directory / "tokenizer_config.json"))
    else:
        raise ConfigError(
            f"{directory} holds no tokenizer.json and no {tiktoken_file.FILE}: complete the download, or make the "
            f"former of what there is (transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def end_ids(directory: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """generation_config.json's, or else config.json's, and the tokenizer's own. Raises ConfigError."""
    generation, config = read_json(directory / "generation_config.json"), read_json(directory / "config.json")
    text_config = config.get("text_config") or {}
    for candidate in (generation.get("eos_token_id"), config.get("eos_token_id"), text_config.get("eos_token_id")):
        if candidate is not None:
            found = set(candidate) if isinstance(candidate, list) else {candidate}
            break
    else:
        found = set()
    special = special_tokens(directory)
    own = tokenizer.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return frozenset(found | ({own} if own is not None else set()))


def special_tokens(directory: Path) -> dict[str, str]:
    """Names as templates know them. In the files a value is text, or {"content": text, ...}. Raises ConfigError."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(directory / file)
        for name in SPECIAL:
            value = settings.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[name] = value
    return found


def read_json(file: Path) -> dict[str, Any]:
    """{} where there is no such file. Raises ConfigError for one that holds no object."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, not an object")
    return content
