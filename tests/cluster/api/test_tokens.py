from __future__ import annotations

import asyncio
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.tokens import INLINE_CHARACTERS, Detokenizer, Tokens
from cluster.errors import ConfigError, RequestError


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_text_by_tokens_adds_up_to_text_at_once_even_of_garbage(tokens, ids):
    detokenizer = Detokenizer(tokens)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokens.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_no_broken_character_is_shown_of_whole_text(tokens, text):
    detokenizer = Detokenizer(tokens)
    shown = "".join(detokenizer.push(token_id) for token_id in tokens.tokenizer.encode(text).ids)
    assert shown == text or text.endswith("\ufffd") or "<|" in text


def test_a_character_of_several_tokens_comes_whole(tokens):
    detokenizer = Detokenizer(tokens)
    pieces = [detokenizer.push(token_id) for token_id in tokens.tokenizer.encode("💥").ids]
    assert len(pieces) == 4
    assert pieces == ["", "", "", "💥"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_tokens_bytes_are_the_texts_own(tokens, text):
    ids = tokens.tokenizer.encode(text).ids
    assert b"".join(tokens.bytes_of(token_id) for token_id in ids) == text.encode()


def test_an_id_beyond_the_tokenizer_has_no_text(tokens):
    assert tokens.bytes_of(10_000) == b""


def test_long_text_gives_the_same_ids_as_short(tokens):
    text = "hello world " * (INLINE_CHARACTERS // 6)
    assert asyncio.run(tokens.encode(text)) == tuple(tokens.tokenizer.encode(text).ids)


def test_long_chats_are_rendered_too(tokens):
    content = "hello " * INLINE_CHARACTERS
    ids = asyncio.run(tokens.encode_chat([{"role": "user", "content": content}], {}))
    assert content in tokens.tokenizer.decode(ids)


def test_ends_of_generation_come_from_the_generation_config_and_the_tokenizer(target, tmp_path):
    copy = shutil.copytree(target, tmp_path / "copy")
    assert Tokens.load(copy).eos_ids == {2}
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    assert Tokens.load(copy).eos_ids == {0, 1, 2}
    (copy / "generation_config.json").unlink()
    assert Tokens.load(copy).eos_ids == {0, 2}


def test_a_target_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} holds no tokenizer.json"):
        Tokens.load(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no tokenizer"):
        Tokens.load(tmp_path)


def test_a_template_file_comes_before_the_config(target, tmp_path):
    copy = shutil.copytree(target, tmp_path / "copy")
    (copy / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0].content }}")
    ids = asyncio.run(Tokens.load(copy).encode_chat([{"role": "user", "content": "hello"}], {}))
    assert ids == tuple(Tokens.load(copy).tokenizer.encode("<|im_end|>hello").ids)


def test_a_target_without_a_template_says_which_endpoint_to_use(target, tmp_path):
    copy = shutil.copytree(target, tmp_path / "copy")
    (copy / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RequestError, match="no chat template: use /v1/completions"):
        asyncio.run(Tokens.load(copy).encode_chat([{"role": "user", "content": "hello"}], {}))
