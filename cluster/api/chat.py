"""/v1/chat/completions: the conversation's prompt, and the shape of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.api.router import Prompts
from cluster.api.schema import ChatRequest
from cluster.api.shapes import Whole
from cluster.api.text import LoggedToken, Piece
from cluster.api.tokens import Tokens

OBJECTS = ("chat.completion", "chat.completion.chunk")


async def chat_prompts(request: ChatRequest, tokens: Tokens) -> Prompts:
    messages = [message.for_template() for message in request.messages]
    ids = await tokens.encode_chat(messages, request.chat_template_kwargs)
    return Prompts((ids,), "messages", None)


class ChatShape:
    """Messages when whole, deltas when streamed."""

    def __init__(self, request: ChatRequest, tokens: Tokens):
        self._request, self._tokens = request, tokens

    def opening(self, choice: int) -> dict[str, Any]:
        return _delta(choice, {"role": "assistant", "content": ""}, None, None)

    def piece(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return _delta(piece.choice, delta, self._logprobs(piece.logged), piece.finish)

    def whole(self, choice: int, whole: Whole) -> dict[str, Any]:
        return {
            "index": choice,
            "message": {"role": "assistant", "content": "".join(whole.text), "refusal": None},
            "logprobs": self._logprobs(whole.logged),
            "finish_reason": whole.finish,
        }

    def _logprobs(self, logged: Sequence[LoggedToken]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return {"content": [self._logged(token) for token in logged], "refusal": None}

    def _logged(self, token: LoggedToken) -> dict[str, Any]:
        return {
            **self._token(token.token_id, token.logprobs.logprob),
            "top_logprobs": [self._token(top, logprob) for top, logprob in token.logprobs.top],
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        own = self._tokens.bytes_of(token_id)
        return {"token": self._tokens.text_of(token_id), "logprob": logprob, "bytes": list(own)}


def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
