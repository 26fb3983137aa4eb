"""Around every request: its id, a count of its status, and a last net under whatever was not foreseen."""

from __future__ import annotations

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.api.answer import json_response
from cluster.api.errors import problem
from cluster.api.metrics import Metrics

log = logging.getLogger(__name__)

HEADER = "X-Request-Id"
USABLE = re.compile(r"[\x21-\x7e]{1,128}")


class Envelope:
    """ASGI middleware. A client's X-Request-Id comes back if it is printable and short, or else a new one does."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if USABLE.fullmatch(given) else secrets.token_hex(16)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[HEADER] = request_id
                self._metrics.responded(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log.exception("request %s to %s failed", request_id, scope["path"])
            if started:
                raise
            told = problem(error)
            await json_response(told.body, told.status, told.headers)(scope, receive, send_with_id)
