"""One choice from submission to its end, over as many engines as it takes; and several choices as one stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.api.balance import prompt_key
from cluster.api.engine_client import EngineClient, EngineStream
from cluster.api.engines import Engines
from cluster.api.errors import DeadlineError, GenerationError
from cluster.api.metrics import Metrics
from cluster.api.text import ChoiceText, Piece
from cluster.contracts import Delta, EngineRequest
from cluster.errors import EngineDiedError, OverloadedError, PacelineError, RequestError

log = logging.getLogger(__name__)

DEADLINE_GRACE_S = 1.0  # for the engine to say itself that a deadline has passed
MAX_WAITING_PIECES = 64


@dataclass(frozen=True)
class Choice:
    """What an engine is to generate, and how its tokens become text."""

    request: EngineRequest
    text: ChoiceText


class Generator:
    """Runs choices on engines. Leaving an iteration early, for whatever reason, frees the choice on its engine."""

    def __init__(self, engines: Engines, metrics: Metrics, max_failovers: int, retry_after_s: float):
        self._engines, self._metrics = engines, metrics
        self._max_failovers, self._retry_after_s = max_failovers, retry_after_s

    async def run(self, choice: Choice) -> AsyncGenerator[Piece]:
        """Pieces until one has `finish`. When an engine dies another goes on from the tokens that are already there.

        Raises EngineDiedError (none could), OverloadedError, DeadlineError; what the engine says of the request itself
        comes as RequestError or GenerationError.
        """
        request, text = choice.request, choice.text
        clock = self._metrics.clock()
        route = _Route(self._engines, prompt_key(request.prompt_ids, request.cache_salt), self._retry_after_s)
        while True:
            engine = route.next()
            if route.losses:
                self._metrics.failed_over()
            try:
                with engine.submit(replace(request, generated_ids=tuple(text.generated_ids))) as deltas:
                    while not text.finished:
                        delta = _checked(await _next(deltas, request.deadline))
                        clock.step(delta)
                        piece = text.take(delta)
                        if piece.finish is not None:
                            clock.end(piece.finish)
                        yield piece
                return
            except OverloadedError as error:
                route.refused(error)
            except EngineDiedError as error:
                if len(text.generated_ids) >= request.max_new_tokens:  # it died between the last token and `finish`
                    clock.end("length")
                    yield text.end("length")
                    return
                log.warning("request %s lost engine %s: %s", request.request_id, engine.info.engine_id, error)
                route.lost(error)
                if route.losses > self._max_failovers:
                    raise

    async def run_all(self, choices: Sequence[Choice]) -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come. The first failure ends them all."""
        if len(choices) == 1:
            async with contextlib.aclosing(self.run(choices[0])) as pieces:
                async for piece in pieces:
                    yield piece
            return
        waiting: asyncio.Queue[Piece | BaseException] = asyncio.Queue(MAX_WAITING_PIECES)
        tasks = [asyncio.create_task(self._feed(choice, waiting)) for choice in choices]
        try:
            unfinished = len(tasks)
            while unfinished:
                item = await waiting.get()
                if isinstance(item, BaseException):
                    raise item
                unfinished -= item.finish is not None
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _feed(self, choice: Choice, waiting: asyncio.Queue[Piece | BaseException]) -> None:
        try:
            async with contextlib.aclosing(self.run(choice)) as pieces:
                async for piece in pieces:
                    await waiting.put(piece)
        except Exception as error:  # raised again by whoever reads the queue
            await waiting.put(error)


class _Route:
    """The engines that one choice goes to, none twice."""

    def __init__(self, engines: Engines, key: bytes, retry_after_s: float):
        self._engines, self._key, self._retry_after_s = engines, key, retry_after_s
        self._tried: set[str] = set()
        self._failure: Exception | None = None
        self.losses = 0

    def next(self) -> EngineClient:
        """Raises what the last engine failed with, if there is no other."""
        try:
            engine = self._engines.pick(self._key, without=self._tried)
        except EngineDiedError as none_left:
            if self._failure is None:
                raise
            raise self._failure from none_left
        self._tried.add(engine.info.engine_id)
        return engine

    def refused(self, error: OverloadedError) -> None:
        self._failure = OverloadedError(f"{error} (no engine has room): try again later", self._retry_after_s)

    def lost(self, error: EngineDiedError) -> None:
        self.losses += 1
        self._failure = EngineDiedError(f"{error}, and no other engine could take the request over: send it again")


def _checked(delta: Delta) -> Delta:
    """The delta, if it is no failure."""
    match delta.finish:
        case "deadline":
            raise DeadlineError(
                "the request was not finished within its time: ask for fewer tokens, or try again later"
            )
        case "abort":
            raise EngineDiedError("the engine gave up the request")
        case "error":
            raise _failure(delta.error or "the engine failed on the request", delta.error_kind)
    return delta


def _failure(message: str, kind: str | None) -> PacelineError:
    match kind:
        case "request":
            return RequestError(message)
        case "overloaded":
            return OverloadedError(message)
        case "engine":
            return EngineDiedError(message)
        case _:
            return GenerationError(message)


async def _next(deltas: EngineStream, deadline: float | None) -> Delta:
    """The next delta. The router's own watch on a deadline (unix seconds), should the engine not keep it."""
    left = None if deadline is None else max(0.0, deadline - time.time()) + DEADLINE_GRACE_S
    try:
        async with asyncio.timeout(left):
            return await anext(deltas)
    except TimeoutError:
        raise DeadlineError("the request was not finished within its time: the engine is too slow or hangs") from None
