"""A tokenizer.json's equal, made of a tiktoken.model and of what the checkpoint says beside it. Runs none of its code.

A tiktoken.model lists token bytes in order of rank. Text is cut into pieces by a pattern; in each piece the two
neighbours whose joined bytes have the lowest rank become one token, until none have one. The pattern is in no data
file: it is known here by the name of the tokenizer's module.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from cluster.byte_level import CHARACTERS
from cluster.errors import ConfigError

FILE = "tiktoken.model"

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI = "|".join(  # of moonshotai's tokenization_kimi.py; that one also cuts runs of 25,000 characters without a space
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
PATTERNS = {"tokenization_kimi": _KIMI}  # by module of tokenizer_config.json's auto_map


def read_tiktoken(file: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """settings: the checkpoint's tokenizer_config.json. Raises ConfigError that names file, key and cure."""
    pattern = _pattern(file, settings)
    ranks = _ranks(file)
    vocabulary = {_written(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_tokens(tokenizer, len(ranks), file, settings)
    return tokenizer


def _pattern(file: Path, settings: Mapping[str, Any]) -> str:
    named = (settings.get("auto_map") or {}).get("AutoTokenizer")
    module = next((name for name in (named if isinstance(named, list) else [named]) if name), "")
    module = str(module).rpartition("--")[2].partition(".")[0]  # "repository--module.Class"
    if module not in PATTERNS:
        raise ConfigError(
            f"{file} says how bytes are merged but not how text is cut: for that, auto_map.AutoTokenizer in "
            f"{file.with_name('tokenizer_config.json')} must name one of {', '.join(PATTERNS)}, but it is {named!r}. "
            "Convert the tokenizer to a tokenizer.json and put that beside it"
        )
    return PATTERNS[module]


def _ranks(file: Path) -> dict[bytes, int]:
    """By token, in order. Every line is a token in base64, a space and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            decoded, value = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConfigError(
                f"{file} line {number} is not a token in base64 and its rank: download it again"
            ) from error
        if value != len(ranks) or decoded in ranks:
            raise ConfigError(
                f"{file} line {number} has rank {value}, or its token, out of order (rank {len(ranks)} and a new token "
                "come next): download it again"
            )
        ranks[decoded] = value
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ConfigError(
            f"{file} has no token for the byte {missing[0]}, so that not all text has one: download it again"
        )
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """All ways to make each token of two, in order of its rank: whichever two meet, they join at that rank."""
    return [
        (_written(token[:cut]), _written(token[cut:]))
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]


def _add_tokens(tokenizer: Tokenizer, first: int, file: Path, settings: Mapping[str, Any]) -> None:
    """Those of added_tokens_decoder, and in its gaps the reserved ones that the model's own code names so."""
    given = {int(number): token for number, token in (settings.get("added_tokens_decoder") or {}).items()}
    where = f"{file.with_name('tokenizer_config.json')}: added_tokens_decoder"
    if given and min(given) < first:
        raise ConfigError(
            f"{where} has {min(given)}, which is a token of {file.name}: take the files of one checkpoint"
        )
    for number in range(first, max(given, default=first - 1) + 1):
        token = given.get(number, {})
        content = token.get("content", f"<|reserved_token_{number}|>")
        options = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        tokenizer.add_tokens([AddedToken(content, special=bool(token.get("special", True)), **options)])
        if tokenizer.token_to_id(content) != number:
            raise ConfigError(
                f"{where} gives {content!r} the number {number}, but it is {tokenizer.token_to_id(content)}"
            )


def _written(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)
