"""`paceline bench server`: how a server does, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import httpx

from paceline.bench import http_client, load
from paceline.bench.errors import BenchError
from paceline.bench.load import Level
from paceline.bench.prompts import Prompt


@dataclass(frozen=True)
class ServerOptions:
    """url: of the server, with or without /v1. model None: the first that it lists. timeout_s: of one request.

    requests None: of each concurrency level, all prompts once and at least four a client.
    """

    url: str
    model: str | None
    api_key: str | None
    concurrency: tuple[int, ...]
    max_tokens: int
    temperature: float
    requests: int | None
    timeout_s: float

    def requests_at(self, concurrency: int, prompts: int) -> int:
        return self.requests or max(prompts, 4 * concurrency)


def base_url(url: str) -> str:
    """With /v1 at its end. Raises BenchError if it is no HTTP address."""
    trimmed = url.rstrip("/")
    if not trimmed.startswith(("http://", "https://")):
        raise BenchError(f"--url is {url!r}: it must start with http:// or https://")
    return trimmed if trimmed.endswith("/v1") else f"{trimmed}/v1"


async def measure(
    options: ServerOptions, prompts: Sequence[Prompt], advance: Callable[[int, str], None]
) -> tuple[str, list[Level]]:
    """The model's name and a Level for each concurrency. Raises BenchError if the first request of all fails."""
    base = base_url(options.url)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = httpx.Timeout(options.timeout_s, connect=10.0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=max(options.concurrency))
    async with httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits) as client:
        model = options.model or await http_client.served_model(client, base)
        ask = http_client.Ask(model, options.max_tokens, options.temperature, options.timeout_s)
        warm_up = await http_client.timed(client, base, ask, prompts[0])
        if warm_up.error is not None:
            raise BenchError(f"--url {options.url}: a first request for model {model!r} failed: {warm_up.error}")
        send = partial(http_client.timed, client, base, ask)
        levels = []
        for concurrency in options.concurrency:
            requests = options.requests_at(concurrency, len(prompts))
            levels.append(await load.measure(send, prompts, concurrency, requests, advance))
    return model, levels
