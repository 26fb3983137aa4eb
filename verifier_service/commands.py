"""What other threads ask of the engine's, taken between two steps."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.contracts import EngineRequest
from verifier_service.emission import Sink
from verifier_service.grammar.desk import Ticket
from verifier_service.sequence import Key


@dataclass(frozen=True)
class Start:
    request: EngineRequest
    sink: Sink


@dataclass(frozen=True)
class Abort:
    """sink: only if the request is this one's; None: whoever's."""

    key: Key
    sink: Sink | None


@dataclass(frozen=True)
class Drop:
    """All requests of a sink."""

    sink: Sink


@dataclass(frozen=True)
class Compiled:
    """A request's grammar is there, or has failed."""

    ticket: Ticket


Command = Start | Abort | Drop | Compiled
