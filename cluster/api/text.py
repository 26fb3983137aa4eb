"""One choice's tokens on their way to the client: detokenized, cut at stop strings, counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.api.stops import StopCutter
from cluster.api.tokens import Detokenizer, Tokens
from cluster.contracts import Delta, TokenLogprobs


@dataclass(frozen=True)
class LoggedToken:
    """A token of the shown text with its log probabilities. offset: of its first character in the choice's text."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True)
class Piece:
    """What one step adds to a choice. finish: None, "stop" or "length"; nothing follows a piece that has one.

    generated, accepted, rejected: tokens of the choice so far: all, those that were drafts, drafts that were refused.
    cached: tokens of its prompt that were found in the engine's prefix cache.
    """

    choice: int
    text: str
    finish: str | None
    generated: int
    accepted: int
    rejected: int
    logged: tuple[LoggedToken, ...] = ()
    cached: int = 0


@dataclass
class ChoiceText:
    """Turns the Deltas of one choice into Pieces. `generated_ids` is what a resumed request has to carry.

    stop_ids: tokens that end the text without being part of it. min_tokens: stop strings count only after so many.
    """

    choice: int
    tokens: Tokens
    stops: Sequence[str]
    stop_ids: frozenset[int]
    min_tokens: int
    generated_ids: list[int] = field(default_factory=list)
    finished: bool = False
    accepted: int = 0
    rejected: int = 0
    cached: int | None = None

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokens)
        self._cutter = StopCutter(self.stops)
        self._decoded = 0
        self._shown = 0
        self._waiting: deque[tuple[int, LoggedToken]] = deque()

    def take(self, delta: Delta) -> Piece:
        """Tokens after a completed stop string do not count: the same tokens count whatever the size of the steps."""
        shown, kept = "", 0
        if self.cached is None and delta.token_ids:
            self.cached = delta.cached
        for index, token_id in enumerate(delta.token_ids):
            kept += 1
            self.generated_ids.append(token_id)
            if delta.finish == "stop" and index == len(delta.token_ids) - 1 and token_id in self.stop_ids:
                break
            logprobs = delta.logprobs[index] if delta.logprobs is not None else None
            shown += self._show(token_id, logprobs)
            if self._cutter.stopped:
                break
        accepted = min(delta.accepted, kept)
        self.accepted += accepted
        self.rejected += max(0, delta.drafted - delta.accepted)
        if self._cutter.stopped:
            return self._piece(shown, "stop")
        if delta.finish is None:
            return self._piece(shown, None)
        shown += self._cut(self._detokenizer.flush())
        if self._cutter.stopped:
            return self._piece(shown, "stop")
        return self._piece(shown + self._cutter.flush(), delta.finish)

    def end(self, finish: str) -> Piece:
        """The choice is over without another Delta."""
        return self.take(Delta("", self.choice, (), finish=finish))

    def _show(self, token_id: int, logprobs: TokenLogprobs | None) -> str:
        begin = self._decoded
        text = self._detokenizer.push(token_id)
        self._decoded += len(text)
        if logprobs is not None:
            self._waiting.append((self._decoded, LoggedToken(token_id, begin, logprobs)))
        return self._cut(text)

    def _cut(self, text: str) -> str:
        if len(self.generated_ids) < self.min_tokens:
            return text
        return self._cutter.push(text)

    def _piece(self, text: str, finish: str | None) -> Piece:
        self._shown += len(text)
        self.finished = finish is not None
        logged = []
        # A token's log probabilities go out with the last of its characters; at the end, with the first.
        while self._waiting and (self._waiting[0][0] <= self._shown or self._is_visible(self._waiting[0][1])):
            logged.append(self._waiting.popleft()[1])
        counts = (len(self.generated_ids), self.accepted, self.rejected)
        return Piece(self.choice, text, finish, *counts, tuple(logged), self.cached or 0)

    def _is_visible(self, token: LoggedToken) -> bool:
        return self.finished and (token.offset < self._shown or not self._cutter.stopped)
