"""Requests whose grammar is being compiled: they wait, the others go on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.contracts import EngineRequest
from verifier_service.grammar.compiler import GrammarCompiler
from verifier_service.grammar.constraint import Constraint
from verifier_service.sequence import Key, key_of

THREADS = 2


@dataclass(eq=False)
class Ticket:
    """One wait. compiled: done once the ticket is handed to `ready`; raises GrammarError."""

    request: EngineRequest
    sink: Any
    compiled: Future[Constraint] = field(default_factory=Future)


class GrammarDesk:
    """Used on the engine's thread alone; ready(ticket) is called on another when a compilation has ended.

    Closed, and so of no use, without a compiler.
    """

    def __init__(self, compiler: GrammarCompiler | None, ready: Callable[[Ticket], object]):
        self._compiler, self._ready = compiler, ready
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammar")
        self._waiting: dict[Key, Ticket] = {}

    @property
    def open(self) -> bool:
        return self._compiler is not None

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: Key) -> bool:
        return key in self._waiting

    def sink_of(self, key: Key) -> Any:
        """None if the request is not here."""
        ticket = self._waiting.get(key)
        return ticket.sink if ticket is not None else None

    def tickets(self) -> list[Ticket]:
        return list(self._waiting.values())

    def begin(self, request: EngineRequest, sink: Any) -> None:
        assert self._compiler is not None
        ticket = Ticket(request, sink)
        self._waiting[key_of(request)] = ticket
        ticket.compiled = self._threads.submit(self._compiler.compile, request)
        ticket.compiled.add_done_callback(lambda _: self._ready(ticket))

    def leave(self, key: Key) -> Ticket | None:
        """None if the request does not wait here. Its compilation is cancelled, or ends for nobody."""
        ticket = self._waiting.pop(key, None)
        if ticket is not None:
            ticket.compiled.cancel()
        return ticket

    def collect(self, ticket: Ticket) -> bool:
        """Whether the request still waits; it then no longer does."""
        key = key_of(ticket.request)
        if self._waiting.get(key) is not ticket:
            return False  # aborted meanwhile, and perhaps sent again
        del self._waiting[key]
        return True

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
