"""What the shapes of both endpoints have in common: identity, usage, and what a whole answer is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.api.schema import SamplingFields
from cluster.api.text import LoggedToken, Piece


@dataclass
class Usage:
    """Tokens of a request so far. Drafts that were accepted are part of the completion, refused ones are not.

    choices_per_prompt: n of the request. A prompt counts once, and so does what was cached of it before its first
    choice.
    """

    prompt_tokens: int
    choices_per_prompt: int = 1
    choices: dict[int, Piece] = field(default_factory=dict)

    def add(self, piece: Piece) -> None:
        self.choices[piece.choice] = piece

    def as_json(self) -> dict[str, Any]:
        pieces = self.choices.values()
        completion = sum(piece.generated for piece in pieces)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(p.cached for p in pieces if p.choice % self.choices_per_prompt == 0)
            },
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(piece.accepted for piece in pieces),
                "rejected_prediction_tokens": sum(piece.rejected for piece in pieces),
            },
        }


@dataclass
class Whole:
    """One choice of an answer that is not streamed."""

    text: list[str] = field(default_factory=list)
    logged: list[LoggedToken] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.logged += piece.logged
        self.finish = piece.finish


class Shape(Protocol):
    """How one endpoint writes its answer. `choice` counts from 0 over the whole response."""

    def opening(self, choice: int) -> dict[str, Any] | None:
        """What a stream's choice begins with, before any of its text."""
        ...

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A streamed choice's next part."""
        ...

    def whole(self, choice: int, whole: Whole) -> dict[str, Any]:
        """A choice of an answer in one part."""
        ...


@dataclass
class Answer:
    """Builds the JSON objects of one response. objects: names of a whole answer and of a chunk."""

    id: str
    created: int
    model: str
    objects: tuple[str, str]
    shape: Shape
    usage: Usage
    request: SamplingFields

    def opening(self, choice: int) -> dict[str, Any] | None:
        first = self.shape.opening(choice)
        return self._chunk([first]) if first is not None else None

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """None where there is nothing to tell."""
        self.usage.add(piece)
        if not piece.text and piece.finish is None and not piece.logged:
            return None
        return self._chunk([self.shape.piece(piece)])

    def closing(self) -> dict[str, Any] | None:
        """The chunk with the usage, if it was asked for."""
        if not self.request.stream_options.include_usage:
            return None
        return {**self._chunk([]), "usage": self.usage.as_json()}

    def whole(self, choices: dict[int, Whole]) -> dict[str, Any]:
        return {
            **self._head(self.objects[0]),
            "choices": [self.shape.whole(index, choices[index]) for index in sorted(choices)],
            "usage": self.usage.as_json(),
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head(self.objects[1]), "choices": choices}
        options = self.request.stream_options
        if options.continuous_usage_stats:
            chunk["usage"] = self.usage.as_json()
        elif options.include_usage:
            chunk["usage"] = None
        return chunk

    def _head(self, object: str) -> dict[str, Any]:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}
