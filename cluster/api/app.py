"""The ASGI application around a RouterCore: routes, keys, errors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from cluster.api import chat, completions
from cluster.api.answer import json_response, respond
from cluster.api.body import parse
from cluster.api.chat import ChatShape, chat_prompts
from cluster.api.completions import CompletionShape, completion_prompts
from cluster.api.envelope import Envelope
from cluster.api.errors import ApiError, problem
from cluster.api.router import Prompts, RouterCore
from cluster.api.schema import ChatRequest, CompletionRequest, SamplingFields
from cluster.api.shapes import Answer, Shape, Usage
from cluster.api.sse import ClientGoneError
from cluster.errors import PacelineError

CLIENT_GONE = 499  # nginx's word for it; only logs and metrics see it


def create_app(core: RouterCore) -> FastAPI:
    """Serves `core` until shutdown, which closes it. Where engines come from is the caller's: `core.set_engines`."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await core.close()

    app = FastAPI(title="Paceline", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Envelope, metrics=core.metrics)
    app.add_exception_handler(PacelineError, _told)
    app.add_exception_handler(HTTPException, _told_by_routing)
    app.add_exception_handler(ClientGoneError, _client_gone)
    app.include_router(_openai_routes(core))
    app.include_router(_operator_routes(core))
    return app


def _openai_routes(core: RouterCore) -> APIRouter:
    routes = APIRouter(prefix="/v1", dependencies=[Depends(_key_check(core.settings.api_keys))])

    @routes.post("/completions")
    async def create_completion(request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request, core))
        core.check_model(asked.model)
        prompts = await completion_prompts(asked, core.tokens)
        shape = CompletionShape(asked, core.tokens)
        return await _respond(core, request, asked, prompts, shape, "cmpl", completions.OBJECTS)

    @routes.post("/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request, core))
        core.check_model(asked.model)
        prompts = await chat_prompts(asked, core.tokens)
        return await _respond(core, request, asked, prompts, ChatShape(asked, core.tokens), "chatcmpl", chat.OBJECTS)

    @routes.get("/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [_model(core, name) for name in core.model_names]})

    @routes.get("/models/{name:path}")
    async def get_model(name: str) -> Response:
        core.check_model(name)
        return json_response(_model(core, name))

    return routes


def _operator_routes(core: RouterCore) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        healthy, engines = core.health()
        problems = [
            f"engine {engine.engine_id or engine.address}: {engine.problem}" for engine in engines if engine.problem
        ]
        told: dict[str, Any] = {
            "status": "ok" if healthy else "unavailable",
            "model": core.model_names[0],
            "engines": len(engines),
            "healthy": sum(engine.problem is None for engine in engines),
            "linked": sum(engine.linked for engine in engines),
            "problems": problems if engines else ["no engine has registered yet"],
        }
        return json_response(told, 200 if healthy else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        engines = core.health()[1]
        core.metrics.engines.set(sum(engine.problem is None for engine in engines))
        core.metrics.waiting.set(sum(engine.waiting for engine in engines))
        core.metrics.drafting_failures.set(sum(engine.drafting_failures for engine in engines))
        core.metrics.of_engines.engines = [engine.counts for engine in engines if engine.counts is not None]
        return Response(core.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes


async def _respond(
    core: RouterCore,
    request: Request,
    asked: SamplingFields,
    prompts: Prompts,
    shape: Shape,
    prefix: str,
    objects: tuple[str, str],
) -> Response:
    response_id = f"{prefix}-{secrets.token_hex(16)}"
    choices = await core.plan(asked, prompts, response_id, _salt(request))
    core.metrics.prompt_tokens.inc(prompts.tokens)
    usage = Usage(prompts.tokens, asked.n)
    answer = Answer(response_id, int(time.time()), asked.model, objects, shape, usage, asked)
    return await respond(answer, core.generate(choices), request.receive)


async def _body(request: Request, core: RouterCore) -> bytes:
    """The body, refused with 413 as soon as it is known to be too long."""
    limit, timeout_s = core.settings.max_body_bytes, core.settings.body_timeout_s
    too_long = ApiError(413, f"the body is longer than the limit of {limit} bytes: send less", code="body_too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", code="body_timeout") from None
    return bytes(body)


def _key_check(keys: tuple[str, ...]) -> Callable[[Request], None]:
    accepted = [_digest(key) for key in keys]

    def check(request: Request) -> None:
        if not accepted:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        offered = _digest(given.strip())
        if scheme.lower() == "bearer" and any(hmac.compare_digest(offered, key) for key in accepted):
            request.state.tenant = offered
            return
        message = "no valid API key: send the header `Authorization: Bearer KEY`"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    return check


def _salt(request: Request) -> str:
    """Tenants, told apart by their keys, share no cached prefix."""
    return getattr(request.state, "tenant", "")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", errors="replace")).hexdigest()


def _model(core: RouterCore, name: str) -> dict[str, Any]:
    described = {"id": name, "object": "model", "created": core.created, "owned_by": "paceline"}
    context = core.engines.max_context
    return described if context is None else {**described, "max_model_len": context}


async def _told(_: Request, error: Exception) -> Response:
    told = problem(error)
    return json_response(told.body, told.status, told.headers)


async def _told_by_routing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"there is no {path} here: the API is under /v1",
        405: f"{path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    return await _told(request, ApiError(error.status_code, message, headers=error.headers))


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
