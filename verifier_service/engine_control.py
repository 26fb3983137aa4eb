"""The front's connection to its own engine: status, drafters, settings. The same port that routers use."""

from __future__ import annotations

import asyncio
import itertools

import msgspec

from cluster.contracts import Configure, EngineInfo, FromEngine, Probe, SetDrafters, Status
from cluster.errors import EngineDiedError
from cluster.wire import Codec


class EngineControl:
    """One connection, one question at a time. Any failure raises EngineDiedError; a new object starts afresh."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, codec: Codec[FromEngine]):
        self._reader, self._writer, self._codec = reader, writer, codec
        self._nonces = itertools.count(1)
        self._asking = asyncio.Lock()
        self.info: EngineInfo

    @classmethod
    async def connect(cls, address: str, timeout_s: float) -> EngineControl:
        """address: "host:port". Waits for the engine's own introduction."""
        host, _, port = address.rpartition(":")
        codec: Codec[FromEngine] = Codec(FromEngine)
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(host, int(port))
                control = cls(reader, writer, codec)
                first = await codec.read(reader)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise EngineDiedError(f"no engine answers at {address}: {error!r}") from error
        if not isinstance(first, EngineInfo):
            raise EngineDiedError(f"{address} began with a {type(first).__name__}, not with its EngineInfo")
        control.info = first
        return control

    async def status(self, timeout_s: float) -> Status:
        async with self._asking:
            nonce = next(self._nonces)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._send(Probe(nonce))
                    while True:
                        message = await self._codec.read(self._reader)
                        if isinstance(message, Status) and message.nonce == nonce:
                            return message
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                raise EngineDiedError(f"the engine did not answer a probe within {timeout_s:g} s: {error!r}") from error

    async def set_drafters(self, addresses: tuple[str, ...]) -> None:
        await self._tell(SetDrafters(addresses))

    async def configure(self, settings: Configure) -> None:
        await self._tell(settings)

    def close(self) -> None:
        self._writer.close()

    async def _tell(self, message: msgspec.Struct) -> None:
        try:
            await self._send(message)
        except OSError as error:
            raise EngineDiedError(f"the engine's connection broke: {error!r}") from error

    async def _send(self, message: msgspec.Struct) -> None:
        self._writer.write(self._codec.pack(message))
        await self._writer.drain()
