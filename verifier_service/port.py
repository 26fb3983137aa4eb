"""The engine port: clients (routers, the front, the bench) talk to rank 0 over TCP, frames of cluster.wire.

An asyncio loop in one background thread serves all connections. Deltas leave in one message per step and connection,
in several if it would be too long.
A connection that closes takes its requests with it; one that does not read is dropped before it fills the memory; bytes
that are no frame of ours end their connection and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading

from cluster.contracts import (
    Abort,
    Configure,
    Delta,
    Deltas,
    FromEngine,
    Probe,
    SetDrafters,
    Submit,
    ToEngine,
)
from cluster.errors import ProtocolError, SecretError
from cluster.handshake import ENGINE, admit, check_secret
from cluster.tls import OPEN, Access, listener_context
from cluster.wire import Codec
from verifier_service.engine import Engine

log = logging.getLogger(__name__)

MAX_UNREAD_BYTES = 16 << 20
HANDSHAKE_S = 5.0
MAX_STRANGERS = 64  # connections that have proved nothing yet; the oldest gives way
DRAIN_S = 2.0  # at the end, for what was written to reach its reader


class EnginePort:
    """Serves `engine` on host:port (port 0: any free one) from construction until `stop`. `address` is "host:port".

    access: what clients have to bring. Raises OSError if the address cannot be bound, ConfigError for an empty secret
    where other machines can reach it and for TLS files that cannot be used.
    """

    def __init__(
        self,
        engine: Engine,
        host: str,
        port: int = 0,
        *,
        access: Access = OPEN,
        max_unread_bytes: int = MAX_UNREAD_BYTES,
    ):
        check_secret(access.secret, host, "verifier.link.token")
        self._engine = engine
        self._access = access
        self._tls = listener_context(access.tls)
        self._max_unread_bytes = max_unread_bytes
        self._connections: set[_Connection] = set()
        self._strangers: dict[_Connection, None] = {}  # an ordered set, of _connections
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._listener = listener
        self._thread = threading.Thread(target=self._run, name="engine-port", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send what is written, close every connection and end the thread; takes at most DRAIN_S and a bit."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._close(), self._loop)
            self._thread.join(DRAIN_S + 2)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(
                self._serve,
                sock=self._listener,
                limit=1 << 20,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_S if self._tls is not None else None,
            )
        )
        try:
            self._loop.run_forever()
        finally:
            server.close()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self._engine, self._loop, reader, writer, self._max_unread_bytes)
        self._connections.add(connection)
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()
        self._strangers[connection] = None
        try:
            admitted = await connection.admit(self._access.secret)
            self._strangers.pop(connection, None)
            if admitted:
                await connection.serve()
        finally:
            self._strangers.pop(connection, None)
            self._connections.discard(connection)

    async def _close(self) -> None:
        connections = list(self._connections)
        tasks = [asyncio.ensure_future(connection.close()) for connection in connections]
        if tasks:
            await asyncio.wait(tasks, timeout=DRAIN_S)
        current = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not current]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._loop.stop()


class _Connection:
    """One client. `deliver` is its requests' sink, called on the engine's thread; all else runs on the port's loop."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        max_unread_bytes: int,
    ):
        self._engine, self._loop = engine, loop
        self._reader, self._writer = reader, writer
        self._max_unread_bytes = max_unread_bytes
        self._codec: Codec[ToEngine] = Codec(ToEngine)
        self._peer = writer.get_extra_info("peername")
        self._closed = False

    async def admit(self, secret: str) -> bool:
        """False if the client does not know the secret; its connection is closed then."""
        try:
            await admit(self._reader, self._writer, secret, ENGINE, HANDSHAKE_S)
            return True
        except (SecretError, ProtocolError, TimeoutError) as error:
            log.warning("a client at %s is not let in: %s", self._peer, error or "it said nothing")
        except (asyncio.IncompleteReadError, OSError):
            pass  # it has left
        await self.close()
        return False

    async def serve(self) -> None:
        """Until the client is gone or has to go; its requests are then aborted."""
        self._writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send(self._engine.info)
        try:
            while True:
                self._take(await self._codec.read(self._reader))
        except (asyncio.IncompleteReadError, OSError):
            pass  # the client has left
        except ProtocolError as error:
            log.warning("a client at %s does not speak this protocol, its connection is closed: %s", self._peer, error)
        finally:
            self._closed = True
            self._engine.drop(self.deliver)
            self._writer.close()

    def abort(self) -> None:
        """At once, whatever is written."""
        self._closed = True
        self._writer.transport.abort()

    async def close(self) -> None:
        """Once what was written has left."""
        self._closed = True
        self._writer.close()
        with contextlib.suppress(OSError):  # gone already
            await self._writer.wait_closed()

    def deliver(self, deltas: list[Delta]) -> None:
        if self._closed:
            return
        try:
            self._loop.call_soon_threadsafe(self._write, deltas)
        except RuntimeError:
            self._closed = True  # the port has stopped

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit(request):
                self._engine.submit(request, self.deliver)
            case Abort(request_id, choice):
                self._engine.abort(request_id, choice, self.deliver)
            case Probe(nonce):
                self._send(self._engine.status(nonce))
            case SetDrafters(addresses):
                self._engine.set_drafters(addresses)
            case Configure():
                self._engine.configure(message)

    def _write(self, deltas: list[Delta]) -> None:
        self._send(Deltas(tuple(deltas)))

    def _send(self, message: FromEngine) -> None:
        if self._closed or self._writer.transport.is_closing():
            return
        unread = self._writer.transport.get_write_buffer_size()  # before this message: it alone may be a long one
        if unread > self._max_unread_bytes:
            log.warning("a client at %s has %d bytes unread; its connection is dropped", self._peer, unread)
            self._writer.transport.abort()
            return
        try:
            self._writer.writelines(self._frames(message))
        except ProtocolError:
            log.exception("a %s for %s could not be sent; its connection is closed", type(message).__name__, self._peer)
            self._writer.transport.abort()

    def _frames(self, message: FromEngine) -> list[bytes]:
        """One frame, or as many as it takes for Deltas that are too long for one. Raises ProtocolError."""
        try:
            return [self._codec.pack(message)]
        except ProtocolError:
            if not isinstance(message, Deltas) or len(message.deltas) < 2:
                raise
            middle = len(message.deltas) // 2
            halves = message.deltas[:middle], message.deltas[middle:]
            return [frame for half in halves for frame in self._frames(Deltas(half))]
