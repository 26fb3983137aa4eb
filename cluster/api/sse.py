"""Server-sent events, and noticing that a client has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
SEND_S = 60.0  # a client that takes nothing for so long counts as gone
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client has closed its connection: nobody is there to be told anything."""


def event(value: Any) -> bytes:
    """One event that holds a JSON object."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStream(Response):
    """Sends events as they come. The generator is closed when they end, and as soon as the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientGoneError:
            return
        finally:
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await _sent(send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for data in self._events:
            await _sent(send, {"type": "http.response.body", "body": data, "more_body": True})
        await _sent(send, {"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first: then raises ClientGoneError.

    Call it only once the request's body has been read.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _sent(send: Send, message: dict[str, Any]) -> None:
    try:
        async with asyncio.timeout(SEND_S):
            await send(message)
    except (OSError, TimeoutError) as error:
        raise ClientGoneError from error
