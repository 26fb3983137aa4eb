"""From pieces of text to a response: one JSON object, or a stream of events."""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive

from cluster.api.errors import problem
from cluster.api.shapes import Answer, Whole
from cluster.api.sse import DONE, EventStream, event, until_disconnect
from cluster.api.text import Piece
from cluster.errors import PacelineError

log = logging.getLogger(__name__)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


async def respond(answer: Answer, pieces: AsyncGenerator[Piece], receive: Receive) -> Response:
    """Raises what `pieces` raises before the first of them, so that it still becomes a status of its own."""
    if not answer.request.stream:
        return json_response(await until_disconnect(receive, _collect(answer, pieces)))
    first = await until_disconnect(receive, _first(pieces))
    return EventStream(_events(answer, first, pieces))


async def _first(pieces: AsyncGenerator[Piece]) -> Piece:
    return await anext(pieces)


async def _collect(answer: Answer, pieces: AsyncGenerator[Piece]) -> dict[str, Any]:
    choices: dict[int, Whole] = defaultdict(Whole)
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            answer.usage.add(piece)
            choices[piece.choice].add(piece)
    return answer.whole(choices)


async def _events(answer: Answer, first: Piece, pieces: AsyncGenerator[Piece]) -> AsyncGenerator[bytes]:
    """All events of a stream. A failure is an event too, and the last one: there is no [DONE] after it."""
    opened: set[int] = set()
    async with contextlib.aclosing(pieces):
        try:
            piece: Piece | None = first
            while piece is not None:
                if piece.choice not in opened:
                    opened.add(piece.choice)
                    if (opening := answer.opening(piece.choice)) is not None:
                        yield event(opening)
                if (chunk := answer.chunk(piece)) is not None:
                    yield event(chunk)
                piece = await anext(pieces, None)
        except PacelineError as error:
            log.info("stream %s ends with an error: %s", answer.id, error)
            yield event(problem(error).body)
            return
        except Exception as error:
            log.exception("stream %s failed", answer.id)
            yield event(problem(error).body)
            return
        if (closing := answer.closing()) is not None:
            yield event(closing)
        yield DONE
