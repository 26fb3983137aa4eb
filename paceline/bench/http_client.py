"""One streamed request to an OpenAI-compatible server, timed."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import httpx

from paceline.bench.errors import BenchError
from paceline.bench.prompts import Prompt


@dataclass(frozen=True)
class Timing:
    """One request. Seconds. ttft: to the first text; gaps: between chunks with text after it.

    tokens: the server's own count (usage), or else the chunks with text. error: None, or its kind; then the rest is
    what had come before it.
    """

    seconds: float
    ttft: float | None = None
    gaps: tuple[float, ...] = ()
    tokens: int = 0
    counted_by_server: bool = False
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Mean time between tokens after the first; None below two tokens."""
        return sum(self.gaps) / (self.tokens - 1) if self.tokens > 1 and self.gaps else None


@dataclass(frozen=True)
class Ask:
    """What every request of a benchmark has in common. timeout_s: of a whole request."""

    model: str
    max_tokens: int
    temperature: float
    timeout_s: float

    def body(self, prompt: Prompt) -> tuple[str, dict[str, Any]]:
        """Path below the server's base URL, and the JSON to post there."""
        common = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.message is not None:
            return "/chat/completions", {**common, "messages": [{"role": "user", "content": prompt.message}]}
        return "/completions", {**common, "prompt": prompt.text if prompt.ids is None else list(prompt.ids)}


async def timed(client: httpx.AsyncClient, base: str, ask: Ask, prompt: Prompt) -> Timing:
    """Never raises for what the server or the network does: that is a Timing with an error."""
    path, body = ask.body(prompt)
    started = perf_counter()
    arrivals: list[float] = []
    usage, error = None, None
    try:
        async with asyncio.timeout(ask.timeout_s), client.stream("POST", base + path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return Timing(perf_counter() - started, error=f"HTTP {response.status_code}")
            done = False
            async for event in events(response.aiter_lines()):
                if event is None:
                    done = True
                    break
                if "error" in event:
                    error = "error in the stream"
                    break
                if _text(event):
                    arrivals.append(perf_counter())
                usage = event.get("usage") or usage
            if not done and error is None:
                error = "stream ended without [DONE]"
    except (TimeoutError, httpx.TimeoutException):
        error = "timeout"
    except (httpx.HTTPError, ValueError) as problem:
        error = type(problem).__name__
    return Timing(
        seconds=perf_counter() - started,
        ttft=arrivals[0] - started if arrivals else None,
        gaps=tuple(later - earlier for earlier, later in itertools.pairwise(arrivals)),
        tokens=usage["completion_tokens"] if usage else len(arrivals),
        counted_by_server=usage is not None,
        error=error,
    )


async def events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any] | None]:
    """Server-sent events' data as JSON objects; None for [DONE]. Raises ValueError on anything else."""
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            yield None
            return
        event = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"an event is no object: {data[:80]}")
        yield event


async def served_model(client: httpx.AsyncClient, base: str) -> str:
    """The first model that the server lists. Raises BenchError."""
    try:
        response = await client.get(f"{base}/models")
        response.raise_for_status()
        return response.json()["data"][0]["id"]
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchError(
            f"--url {base}: no model is listed at {base}/models ({error!r}): check the address, or give --model"
        ) from error


def _text(event: dict[str, Any]) -> str:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if text := choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return text
    return ""
