"""/v1/completions: prompts, and the shape of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.api.router import COMPLETION_TOKENS, Prompts
from cluster.api.schema import CompletionRequest
from cluster.api.shapes import Whole
from cluster.api.text import LoggedToken, Piece
from cluster.api.tokens import Tokens

OBJECTS = ("text_completion", "text_completion")


async def completion_prompts(request: CompletionRequest, tokens: Tokens) -> Prompts:
    ids = [prompt if isinstance(prompt, tuple) else await tokens.encode(prompt) for prompt in request.prompt]
    return Prompts(tuple(ids), "prompt", COMPLETION_TOKENS)


class CompletionShape:
    """With echo, each choice begins with its prompt's text."""

    def __init__(self, request: CompletionRequest, tokens: Tokens):
        self._request, self._tokens = request, tokens

    def opening(self, choice: int) -> dict[str, Any] | None:
        return _choice(choice, self._prompt(choice), None, None) if self._request.echo else None

    def piece(self, piece: Piece) -> dict[str, Any]:
        return _choice(piece.choice, piece.text, self._logprobs(piece.logged), piece.finish)

    def whole(self, choice: int, whole: Whole) -> dict[str, Any]:
        text = "".join(whole.text)
        if self._request.echo:
            text = self._prompt(choice) + text
        return _choice(choice, text, self._logprobs(whole.logged), whole.finish)

    def _prompt(self, choice: int) -> str:
        prompt = self._request.prompt[choice // self._request.n]
        return prompt if isinstance(prompt, str) else self._tokens.decode(prompt)

    def _logprobs(self, logged: Sequence[LoggedToken]) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        text_of = self._tokens.text_of
        return {
            "tokens": [text_of(token.token_id) for token in logged],
            "token_logprobs": [token.logprobs.logprob for token in logged],
            "top_logprobs": [{text_of(top): logprob for top, logprob in token.logprobs.top} for token in logged],
            "text_offset": [token.offset for token in logged],
        }


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
