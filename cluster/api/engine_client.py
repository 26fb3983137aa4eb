"""One connection to an engine port: many requests at once, status questions, settings."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections import deque
from types import TracebackType

from cluster.contracts import (
    Abort,
    Configure,
    Delta,
    Deltas,
    EngineInfo,
    EngineRequest,
    FromEngine,
    Probe,
    SetDrafters,
    Status,
    Submit,
    ToEngine,
)
from cluster.errors import EngineDiedError, OverloadedError, PacelineError, ProtocolError
from cluster.handshake import ENGINE, check_dialled, enter
from cluster.tls import OPEN, Access, dialler_context
from cluster.wire import Codec

MAX_UNSENT_BYTES = 32 << 20
Key = tuple[str, int]


class EngineClient:
    """Owned by one event loop. Times in seconds.

    When the connection is lost, for whatever reason, every stream and question gets EngineDiedError at once, and so
    does whoever asks later; `reason` says why. A new object starts afresh.
    """

    def __init__(
        self, address: str, info: EngineInfo, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.address = address
        self.info = info
        self.status: Status | None = None
        self.status_at = 0.0
        self.heard_at = time.monotonic()
        self.reason: str | None = None
        self._writer = writer
        self._codec: Codec[FromEngine] = Codec(FromEngine)
        self._streams: dict[Key, EngineStream] = {}
        self._questions: dict[int, asyncio.Future[Status]] = {}
        self._nonces = itertools.count(1)
        self._reading = asyncio.create_task(self._read(reader), name=f"engine {address}")

    @classmethod
    async def connect(cls, address: str, timeout_s: float, access: Access = OPEN) -> EngineClient:
        """address: "host:port". access: to its port. Waits for the engine's introduction.

        Raises EngineDiedError, caused by a SecretError where either end does not know the other's secret.
        """
        host, _, port = address.rpartition(":")
        codec: Codec[FromEngine] = Codec(FromEngine)
        writer = None
        try:
            context = dialler_context(access.tls)
            check_dialled(access.secret, host.strip("[]"))
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), limit=1 << 20, ssl=context)
                await enter(reader, writer, access.secret, ENGINE)
                info = await codec.read(reader)
            if not isinstance(info, EngineInfo):
                raise ProtocolError(f"it began with a {type(info).__name__}, not with its EngineInfo")
        except (
            OSError,
            ValueError,
            TimeoutError,
            asyncio.IncompleteReadError,
            PacelineError,
        ) as error:
            if writer is not None:
                writer.close()
            raise EngineDiedError(f"no engine answers at {address}: {error or type(error).__name__}") from error
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(address, info, reader, writer)

    @property
    def in_flight(self) -> int:
        """Requests of this client that the engine holds."""
        return len(self._streams)

    @property
    def alive(self) -> bool:
        return self.reason is None

    def submit(self, request: EngineRequest) -> EngineStream:
        """Start a request; iterate the result for its Deltas. Leave it by `with` or `close`, so that it is freed."""
        key = (request.request_id, request.choice)
        if key in self._streams:
            raise ValueError(f"request {key} is already running on {self.address}")
        stream = EngineStream(self, key)
        self._send(Submit(request))
        self._streams[key] = stream
        return stream

    async def probe(self, timeout_s: float) -> Status:
        """The engine's account of itself. Raises EngineDiedError if it does not come within timeout_s."""
        nonce = next(self._nonces)
        answer: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._send(Probe(nonce))
        self._questions[nonce] = answer
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise EngineDiedError(f"the engine did not answer a probe within {timeout_s:g} s") from None
        finally:
            self._questions.pop(nonce, None)

    def send(self, message: SetDrafters | Configure) -> None:
        """Tell the engine something that has no answer."""
        self._send(message)

    def close(self, reason: str = "the connection was closed") -> None:
        """Everything under way ends with EngineDiedError. May be called any number of times."""
        self._lost(reason)
        self._reading.cancel()

    async def wait_closed(self) -> None:
        """Until the reading task is gone, after `close` or a loss."""
        await asyncio.wait([self._reading])

    def _forget(self, key: Key, unfinished: bool) -> None:
        if self._streams.pop(key, None) is not None and unfinished and self.alive:
            with contextlib.suppress(EngineDiedError, OverloadedError):  # then its requests end with the connection
                self._send(Abort(*key))

    def _send(self, message: ToEngine) -> None:
        # Never waits, so that it works while a task is being cancelled; a peer that reads nothing is bounded here.
        if self.reason is not None:
            raise EngineDiedError(self.reason)
        if self._writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise OverloadedError("the engine takes in requests more slowly than they arrive: try again later")
        self._writer.write(self._codec.pack(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._dispatch(await self._codec.read(reader))
        except (OSError, asyncio.IncompleteReadError):
            self._lost("the engine's connection was lost")
        except ProtocolError as error:
            self._lost(f"the engine does not speak this protocol: {error}")

    def _dispatch(self, message: FromEngine) -> None:
        self.heard_at = time.monotonic()
        match message:
            case Deltas(deltas):
                for delta in deltas:
                    # No stream: the client has left, and the engine has not yet heard of it.
                    if (stream := self._streams.get((delta.request_id, delta.choice))) is not None:
                        stream._put(delta)
            case Status():
                self.status, self.status_at = message, self.heard_at
                answer = self._questions.get(message.nonce)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case EngineInfo():
                self.info = message

    def _lost(self, reason: str) -> None:
        if self.reason is not None:
            return
        self.reason = reason
        self._writer.transport.abort()
        for stream in list(self._streams.values()):
            stream._fail(reason)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(EngineDiedError(reason))


class EngineStream:
    """The Deltas of one request, in order; ends after the one that has `finish`. Raises EngineDiedError.

    Closing it early aborts the request. Deltas wait here until they are taken, at most max_new_tokens of them.
    """

    def __init__(self, client: EngineClient, key: Key):
        self._client, self._key = client, key
        self._deltas: deque[Delta] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._failure: str | None = None
        self._finished = False

    def __enter__(self) -> EngineStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the request, aborting it if it is not finished."""
        self._client._forget(self._key, unfinished=not self._finished)

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> Delta:
        while not self._deltas:
            if self._finished:
                raise StopAsyncIteration
            if self._failure is not None:
                raise EngineDiedError(self._failure)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._deltas.popleft()

    def _put(self, delta: Delta) -> None:
        if self._finished:
            return
        self._deltas.append(delta)
        self._finished = delta.finish is not None
        self._wake()

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
