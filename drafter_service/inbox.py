"""What linked verifiers want of the engine, queued by their links' threads in order and within bounds."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.link.face import Peer
from cluster.link.messages import DraftAsk, Share

if TYPE_CHECKING:
    import torch

MAX_BYTES = 256 << 20  # of context features that wait to be applied
MAX_REMEMBERED = 1 << 14  # contexts of one link whose newest ask is remembered


@dataclass(frozen=True, slots=True)
class Linked:
    peer: Peer


@dataclass(frozen=True, slots=True)
class Appended:
    """features [count, hidden] for positions start.. of a context."""

    peer: Peer
    context_id: str
    start: int
    features: torch.Tensor


@dataclass(frozen=True, slots=True)
class Dropped:
    """Features of this context did not fit into the inbox: the context is worth nothing without them."""

    peer: Peer
    context_id: str


@dataclass(frozen=True, slots=True)
class Asked:
    peer: Peer
    ask: DraftAsk


@dataclass(frozen=True, slots=True)
class Shared:
    peer: Peer
    share: Share


@dataclass(frozen=True, slots=True)
class Closed:
    peer: Peer
    context_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    peer: Peer


Event = Linked | Appended | Dropped | Shared | Asked | Closed | Lost


class Inbox:
    """Thread-safe. Holds at most `max_asks` asks, as many shares and `max_bytes` of features.

    Lets through one ask for each (link, context, base), and none for a base behind that context's newest: so nothing is
    ever answered twice.
    """

    def __init__(self, max_asks: int, max_bytes: int = MAX_BYTES):
        self._max_asks, self._max_bytes = max_asks, max_bytes
        self._changed = threading.Condition(threading.Lock())
        self._events: list[Event] = []
        self._newest: dict[str, OrderedDict[str, int]] = {}  # link id -> context id -> base
        self._closed = False
        self.asks = 0
        self.bytes = 0
        self._shares = 0
        self.counters: Counter[str] = Counter(refused=0, outdated=0)

    def linked(self, peer: Peer) -> None:
        with self._changed:
            self._newest[peer.link_id] = OrderedDict()
            self._put(Linked(peer))

    def append(self, peer: Peer, context_id: str, start: int, features: torch.Tensor) -> None:
        with self._changed:
            if self.bytes + features.nbytes > self._max_bytes:
                self._put(Dropped(peer, context_id))
                return
            self.bytes += features.nbytes
            self._put(Appended(peer, context_id, start, features))

    def share(self, peer: Peer, share: Share) -> bool:
        """False: there is no room. (A few bytes on the link make a window of rows to be copied.)"""
        with self._changed:
            if self._shares >= self._max_asks:
                return False
            self._shares += 1
            self._put(Shared(peer, share))
            return True

    def draft(self, peer: Peer, asks: Sequence[DraftAsk]) -> list[DraftAsk]:
        """Asks for which there is no room: the caller answers them empty."""
        refused = []
        with self._changed:
            newest = self._newest.setdefault(peer.link_id, OrderedDict())
            for ask in asks:
                if ask.base <= newest.get(ask.context_id, ask.base - 1):
                    self.counters["outdated"] += 1
                    continue
                newest[ask.context_id] = ask.base
                newest.move_to_end(ask.context_id)
                if self.asks >= self._max_asks:
                    refused.append(ask)
                else:
                    self.asks += 1
                    self._put(Asked(peer, ask))
            while len(newest) > MAX_REMEMBERED:
                newest.popitem(last=False)
            self.counters["refused"] += len(refused)
        return refused

    def close_contexts(self, peer: Peer, context_ids: Sequence[str]) -> None:
        with self._changed:
            newest = self._newest.get(peer.link_id)
            if newest is not None:
                for context_id in context_ids:
                    newest.pop(context_id, None)
            self._put(Closed(peer, tuple(context_ids)))

    def lost(self, peer: Peer) -> None:
        with self._changed:
            self._newest.pop(peer.link_id, None)
            self._put(Lost(peer))

    def take(self) -> list[Event]:
        """Everything there is, oldest first; [] if there is nothing."""
        with self._changed:
            events, self._events = self._events, []
            self.asks = self.bytes = self._shares = 0
            return events

    def wait(self) -> bool:
        """Until there is something to take; False once the inbox is shut, whatever it still holds."""
        with self._changed:
            while not self._events and not self._closed:
                self._changed.wait()
            return not self._closed

    def shut(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _put(self, event: Event) -> None:
        if self._closed:
            return
        self._events.append(event)
        self._changed.notify()
