"""Every failure as OpenAI's clients expect it: a status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import EngineDiedError, OverloadedError, PacelineError, RequestError


class ApiError(PacelineError):
    """A failure with its own HTTP status. `param` is the client's name of the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class DeadlineError(PacelineError):
    """A request was not finished within its time (HTTP 504)."""


class GenerationError(PacelineError):
    """An engine gave up on a request (HTTP 500). The message is the engine's own, written for a person."""


@dataclass(frozen=True)
class Problem:
    """What a client is told."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def problem(error: BaseException) -> Problem:
    """Any exception as a client may see it: our own speak for themselves, of others nothing is told."""
    match error:
        case ApiError():
            body = _body(str(error), error.type, error.param, error.code)
            return Problem(error.status, body, error.headers)
        case RequestError():
            return Problem(400, _body(str(error), "invalid_request_error", error.field, None))
        case OverloadedError():
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return Problem(503, _body(str(error), "overloaded_error", None, "overloaded"), headers)
        case EngineDiedError():
            body = _body(str(error), "service_unavailable_error", None, "engine_unavailable")
            return Problem(503, body, {"Retry-After": "1"})
        case DeadlineError():
            return Problem(504, _body(str(error), "timeout_error", None, "deadline_exceeded"))
        case GenerationError():
            return Problem(500, _body(str(error), "server_error", None, "generation_failed"))
        case _:
            return Problem(500, _body("an internal error; the server's log has it", "server_error", None, None))


def unknown_model(name: str, known: tuple[str, ...]) -> ApiError:
    message = f"The model {name!r} does not exist; this server has {', '.join(known)}"
    return ApiError(404, message, param="model", code="model_not_found")


def _body(message: str, type: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}
