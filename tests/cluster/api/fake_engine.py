"""An engine port that speaks the real protocol over real TCP, and answers from a script."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.contracts import (
    Abort,
    Configure,
    Delta,
    Deltas,
    EngineInfo,
    EngineRequest,
    Probe,
    SetDrafters,
    Status,
    Submit,
    ToEngine,
    TokenLogprobs,
)
from cluster.errors import SecretError
from cluster.handshake import ENGINE, admit
from cluster.wire import Codec

Message = Submit | Abort | Probe | SetDrafters | Configure


class FakeEngine:
    """Every request is answered with the same tokens, cut at its limit, in steps of 1, 3, 2, 1, 3, 2, ... tokens.

    pause_after: stop sending, without finishing, once so many tokens of a request are out. refusal: a Delta's error
    fields for every request. All but one token of a step count as accepted drafts, of `drafted` proposed.
    """

    def __init__(
        self, engine_id: str, answer: Sequence[int], end_id: int, max_context: int = 256, vocabulary: int = 400
    ):
        self.info = EngineInfo(engine_id, "target", max_context, vocabulary, max_requests=8, block_size=8)
        self.answer = [*answer, end_id]
        self.end_id = end_id
        self.steps: Sequence[int] = (1, 3, 2)
        self.drafted = 4
        self.cached: Sequence[int] = (0,)  # prompt tokens found in the cache, by choice
        self.secret = ""
        self.pause_after: int | None = None
        self.refusal: dict[str, Any] | None = None
        self.finish: str | None = None
        self.answers_probes = True
        self.counters: dict[str, float] = {}
        self.drafter_id = "drafter"
        self.received: list[Message] = []
        self._codec: Codec[ToEngine] = Codec(ToEngine)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._server: asyncio.Server

    @property
    def submitted(self) -> list[EngineRequest]:
        return [message.request for message in self.received if isinstance(message, Submit)]

    @property
    def aborted(self) -> list[tuple[str, int]]:
        return [(message.request_id, message.choice) for message in self.received if isinstance(message, Abort)]

    async def start(self) -> str:
        """Its address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    async def kill(self) -> None:
        """As when its process dies: the port and all connections are gone at once."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks.values():
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await admit(reader, writer, self.secret, ENGINE, 5.0)
            writer.write(self._codec.pack(self.info))
            while True:
                self._take(await self._codec.read(reader), writer)
        except (OSError, asyncio.IncompleteReadError, SecretError):
            writer.close()

    def _take(self, message: Message, writer: asyncio.StreamWriter) -> None:
        if isinstance(message, Probe):
            if self.answers_probes:
                writer.write(self._codec.pack(self._status(message.nonce)))
            return
        self.received.append(message)
        match message:
            case Submit(request):
                key = (request.request_id, request.choice)
                self._tasks[key] = asyncio.create_task(self._generate(request, writer))
            case Abort(request_id, choice):
                if (task := self._tasks.pop((request_id, choice), None)) is not None:
                    task.cancel()

    def _status(self, nonce: int) -> Status:
        return Status(nonce, 1, 0.0, len(self._tasks), 0, 10, 10, True, self.drafter_id, 1, self.counters)

    async def _generate(self, request: EngineRequest, writer: asyncio.StreamWriter) -> None:
        for delta in self._deltas(request):
            writer.write(self._codec.pack(Deltas((delta,))))
            await asyncio.sleep(0)
        if self.pause_after is not None:
            await asyncio.Event().wait()
        self._tasks.pop((request.request_id, request.choice), None)

    def _deltas(self, request: EngineRequest) -> Iterator[Delta]:
        who = (request.request_id, request.choice)
        if self.refusal is not None:
            yield Delta(*who, (), finish="error", **self.refusal)
            return
        if self.finish is not None:
            yield Delta(*who, (), finish=self.finish)
            return
        limit = request.max_new_tokens
        if self.pause_after is not None:
            limit = min(limit, self.pause_after)
        at = len(request.generated_ids)
        for size in itertools.cycle(self.steps):
            ids = tuple(self.answer[at : min(at + size, limit)])
            stops = [i for i, token in enumerate(ids) if token in request.stop_token_ids]
            ids = ids[: stops[0] + 1] if stops else ids
            at += len(ids)
            ended = bool(stops)
            finish = "stop" if ended else "length" if at >= request.max_new_tokens else None
            drafted = self.drafted if len(ids) > 1 else 0
            cached = self.cached[request.choice % len(self.cached)] if at == len(ids) else 0
            accepted = len(ids) - 1 if drafted else 0
            yield Delta(*who, ids, accepted, drafted, self._logprobs(request, ids), finish, cached=cached)
            if finish is not None or at >= min(limit, len(self.answer)):
                return

    def _logprobs(self, request: EngineRequest, ids: Sequence[int]) -> tuple[TokenLogprobs, ...] | None:
        wanted = request.sampling.logprobs
        if wanted is None:
            return None
        return tuple(TokenLogprobs(-0.5, tuple((id, -0.5) for id in (token, self.end_id)[:wanted])) for token in ids)
