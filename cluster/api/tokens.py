"""Text to token ids and back, as the target's own files say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from cluster.api.chat_template import ChatTemplate
from cluster.byte_level import BYTES
from cluster.errors import RequestError
from cluster.tokenizer_files import end_ids, load_tokenizer, special_tokens

INLINE_CHARACTERS = 4096  # about a millisecond of work: less than what handing it to a thread may cost
THREADS = 2


class Tokens:
    """The tokenizer of one target. Safe to share between threads.

    The `tokenizers` file is taken as it is: transformers' AutoTokenizer rebuilds parts of it from the model's type.
    eos_ids: tokens that end a generation. bytes_of(id): the exact bytes that a token stands for.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int], template: ChatTemplate | None):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self._template = template
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._added = tokenizer.get_added_tokens_decoder()
        self._byte_level = _is_byte_level(tokenizer)

    @classmethod
    def load(cls, directory: str | Path) -> Tokens:
        """directory: of the target's checkpoint. Raises ConfigError, naming the file."""
        directory = Path(directory)
        tokenizer = load_tokenizer(directory)
        return cls(tokenizer, end_ids(directory, tokenizer), ChatTemplate.load(directory, special_tokens(directory)))

    async def encode(self, text: str) -> tuple[int, ...]:
        """A prompt's ids, with the special tokens that the tokenizer adds to a sequence of its own accord."""
        if len(text) <= INLINE_CHARACTERS:
            return self._encode(text, special=True)
        return await self._in_thread(self._encode, text, True)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> tuple[int, ...]:
        """Ids of the rendered conversation, ready for the assistant's turn. Raises RequestError."""
        if sum(len(message.get("content") or "") for message in messages) <= INLINE_CHARACTERS:
            return self._encode_chat(messages, variables)
        return await self._in_thread(self._encode_chat, messages, variables)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def text_of(self, token_id: int) -> str:
        """One token by itself; parts of characters become U+FFFD."""
        return self.bytes_of(token_id).decode("utf-8", errors="replace")

    def bytes_of(self, token_id: int) -> bytes:
        piece = self.tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level and token_id not in self._added:
            return bytes(BYTES[character] for character in piece if character in BYTES)
        return self.tokenizer.decode([token_id], skip_special_tokens=False).encode()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _encode(self, text: str, special: bool) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> tuple[int, ...]:
        if self._template is None:
            raise RequestError("this model has no chat template: use /v1/completions", "messages")
        return self._encode(self._template.render(messages, variables), special=False)  # the template has put them

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)


class Detokenizer:
    """Text of a growing sequence, each character as soon as all of its bytes are there.

    What `push` and, at the end, `flush` return adds up to what decoding all ids at once gives.
    """

    def __init__(self, tokens: Tokens):
        self._tokens = tokens
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = 0
        self._pending = False

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._stream.step(self._tokens.tokenizer, token_id) or ""
        self._pending = not text
        self._shown += len(text)
        return text

    def flush(self) -> str:
        """What was held back for a character that never became whole."""
        if not self._pending:
            return ""
        rest = self._tokens.decode(self._ids)[self._shown :]
        self._shown += len(rest)
        return rest


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", ())])
