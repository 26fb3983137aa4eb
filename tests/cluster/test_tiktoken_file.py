"""A tiktoken.model read as a tokenizer, against the encoding rules written out by hand."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.tokens import Detokenizer, Tokens
from cluster.errors import ConfigError
from cluster.tokenizer_files import load_tokenizer

CORPUS = (
    "the banana bandana, aaaaaaaa! abababab cabbage\n 你好世界 你好 HTTPServer's don't 12345 été naïve 💥\n\n  x == y"
)
TEMPLATE = "{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}<|im_assistant|>"


def a_vocabulary(size: int = 420) -> list[bytes]:
    """Bytes in an order that is not theirs, then pairs of earlier tokens, most frequent first."""
    tokens = [bytes([(byte * 7 + 3) % 256]) for byte in range(256)]
    pieces = [[bytes([b]) for b in piece.encode()] for piece in re.findall(r"\s?\S+|\s+", CORPUS)]
    while len(tokens) < size:
        counts: dict[tuple[bytes, bytes], int] = {}
        for piece in pieces:
            for pair in itertools.pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=lambda pair: counts[pair], default=None)
        if best is None:
            break
        joined = best[0] + best[1]
        if joined not in tokens:
            tokens.append(joined)
        pieces = [_joined(piece, {joined: 0}) for piece in pieces]
    return tokens


def by_hand(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: a piece that is a token is that; else join the leftmost pair of lowest rank, if any, again."""
    if piece in ranks:
        return [ranks[piece]]
    return [ranks[part] for part in _joined([bytes([byte]) for byte in piece], ranks)]


def _joined(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    while True:
        pairs = [(ranks[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return parts
        at = min(pairs)[1]
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


def write(directory: Path, tokens: list[bytes], **changes: object) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (directory / "tiktoken.model").write_text("\n".join(lines) + "\n")
    first = len(tokens)
    names = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "</think>"}
    added = {
        str(first + at): {"content": name, "lstrip": False, "rstrip": False, "special": name != "</think>"}
        for at, name in names.items()
    }
    config = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": first + 2}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


VOCABULARY = a_vocabulary()
RANKS = {token: rank for rank, token in enumerate(VOCABULARY)}
FIRST = len(VOCABULARY)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("kimi"), VOCABULARY)


@pytest.fixture(scope="module")
def tokens(directory: Path) -> Tokens:
    return Tokens.load(directory)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("the banana", ["the", " banana"]),
        ("你好世界hello", ["你好世界", "hello"]),
        (" 你好", [" ", "你好"]),
        ("HTTPServer's don't", ["HTTPServer's", " don't"]),
        ("abcDef", ["abc", "Def"]),
        ("12345", ["123", "45"]),
        ("x == y", ["x", " ==", " y"]),
        ("a \n\n  b", ["a", " \n\n", " ", " b"]),
        ("aaaaaaaa!\n", ["aaaaaaaa", "!\n"]),
        ("日本語カナ", ["日本語", "カナ"]),
        ("été naïve  ", ["été", " naïve", "  "]),
    ],
)
def test_text_is_cut_as_the_pattern_says_and_joined_by_rank(text: str, pieces: list[str], tokens: Tokens):
    expected = [token for piece in pieces for token in by_hand(piece.encode(), RANKS)]
    assert tokens.tokenizer.encode(text).ids == expected


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="abnthe", min_size=1, max_size=30))
def test_a_word_is_joined_as_by_hand(text: str, tokens: Tokens):
    assert tokens.tokenizer.encode(text).ids == by_hand(text.encode(), RANKS)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_any_vocabulary_of_joined_pairs_is_read_so(seed: int, tmp_path_factory: pytest.TempPathFactory):
    rng = random.Random(seed)
    own = [bytes([byte]) for byte in range(256)]
    ends = [b"a", b"b", b"c"]
    for _ in range(25):
        joined = rng.choice(ends) + rng.choice(ends)
        if joined not in own:
            own.append(joined)
            ends.append(joined)
    tokenizer = load_tokenizer(write(tmp_path_factory.mktemp("random"), own))
    ranks = {token: rank for rank, token in enumerate(own)}
    for _ in range(20):
        word = "".join(rng.choice("abc") for _ in range(rng.randint(1, 16)))
        assert tokenizer.encode(word).ids == by_hand(word.encode(), ranks), word


def test_a_piece_that_is_a_token_is_that_even_if_no_joining_leads_there(tmp_path: Path):
    tokenizer = load_tokenizer(write(tmp_path, [*VOCABULARY, b"qzx"]))
    assert tokenizer.encode("qzx").ids == [FIRST]
    assert tokenizer.encode("qzxq").ids == [RANKS[byte] for byte in (b"q", b"z", b"x", b"q")]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(text: str, tokens: Tokens):
    ids = tokens.tokenizer.encode(text).ids
    assert tokens.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(tokens.bytes_of(token) for token in ids) == text.encode()


def test_special_tokens_have_the_numbers_of_the_configuration_and_gaps_are_reserved(tokens: Tokens):
    ids = tokens.tokenizer.encode(f"[BOS]a<|im_end|></think><|reserved_token_{FIRST + 5}|>").ids
    assert ids == [FIRST, RANKS[b"a"], FIRST + 2, FIRST + 6, FIRST + 5]
    assert tokens.decode(ids) == "a</think>"  # as the configuration says, it is no special token
    assert tokens.eos_ids == {FIRST + 1, FIRST + 2}


def test_a_chat_is_rendered_by_its_template_and_streamed_back(tokens: Tokens):
    ids = asyncio.run(tokens.encode_chat([{"role": "user", "content": "你好 banana"}], {}))
    words = [token for piece in ("你好", " banana") for token in by_hand(piece.encode(), RANKS)]
    assert ids == (FIRST + 3, *words, FIRST + 2, FIRST + 4)
    detokenizer = Detokenizer(tokens)
    assert "".join(detokenizer.push(token) for token in words) + detokenizer.flush() == "你好 banana"


def test_a_tokenizer_json_beside_it_comes_first(directory: Path, tokens: Tokens, tmp_path: Path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    tokens.tokenizer.save(str(copy / "tokenizer.json"))
    (copy / "tiktoken.model").write_text("garbage")
    assert load_tokenizer(copy).encode(CORPUS).ids == tokens.tokenizer.encode(CORPUS).ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"auto_map": {"AutoTokenizer": ["tokenization_other.Tok", None]}},
            r"must name one of tokenization_kimi.*Convert",
        ),
        ({"auto_map": None}, r"tokenizer_config\.json must name one of"),
        ({"added_tokens_decoder": {"3": {"content": "x"}}}, r"added_tokens_decoder has 3, which is a token of"),
        ({"added_tokens_decoder": {str(FIRST): {"content": "a"}}}, rf"gives 'a' the number {FIRST}, but it is"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(write(tmp_path, VOCABULARY, **changes))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("YQ==", r"tiktoken\.model line 1 is not a token"),
        ("YQ== 0\n!!!! 1", "line 2 is not a token"),
        ("YQ== 1", "line 1 has rank 1"),
        ("YQ== 0\nYQ== 1", "line 2 has rank 1, or its token, out of order"),
        ("YQ== 0", "no token for the byte 0"),
    ],
)
def test_a_broken_file_is_named(lines: str, message: str, tmp_path: Path):
    write(tmp_path, VOCABULARY)
    (tmp_path / "tiktoken.model").write_text(lines)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(tmp_path)
