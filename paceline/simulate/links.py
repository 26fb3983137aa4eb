"""Links in virtual time: a VerifierLink whose bytes take time, and the pool that says who drafts for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from msgspec.structs import replace

from cluster.link.answers import AnswerBook
from cluster.link.face import LinkState
from cluster.link.messages import DraftAnswer, DraftAsk, Heartbeat, Piece, Share
from cluster.pairing.policy import assign
from paceline.simulate.drafters import WRONG, SimulatedDrafter
from paceline.simulate.virtual_time import Action, Process, VirtualTime

LINK_BYTES_S = 2.5e9  # of one verifier's link: a fifth of a 100 Gbit/s port
REDIAL_S = 0.1


@dataclass(frozen=True)
class Wire:
    """token_bytes: of one token's context features. block_size: of the drafter. hard_deadline_s: of silence, that ends
    an epoch.
    """

    token_bytes: float
    round_trip_s: float
    block_size: int
    hard_deadline_s: float
    bytes_s: float = LINK_BYTES_S


class SimulatedLink:
    """A cluster.link.face.VerifierLink. Features go out one behind the other, and asks behind them."""

    def __init__(self, time: VirtualTime, process: Process, verifier: str, wire: Wire):
        self.verifier = verifier
        self._time, self._process, self._wire = time, process, wire
        self._book = AnswerBook(WRONG + 1)
        self._drafter: SimulatedDrafter | None = None
        self._free_at = 0.0
        self._missing: set[tuple[str, int]] = set()  # that `collect` waits for
        self.state = LinkState(False, 0)

    # The link's face.

    @property
    def drafter_load(self) -> Heartbeat:
        return Heartbeat()

    @property
    def queued_bytes(self) -> int:
        return int(max(0.0, self._free_at - self._time.now) * self._wire.bytes_s)

    def append(self, pieces: Sequence[Piece], features: torch.Tensor) -> None:
        if self._drafter is None:
            return
        drafter, end = self._drafter, _End(self, self.state.epoch)
        sent = sum(piece.count for piece in pieces) * self._wire.token_bytes
        self._free_at = max(self._time.now, self._free_at) + sent / self._wire.bytes_s
        self.state = replace(self.state, sent_bytes=self.state.sent_bytes + int(sent))
        self._time.at(self._arrival(), lambda: drafter.append(end, pieces))

    def share(self, share: Share) -> None:
        """There is nothing to share: no two prompts begin alike."""
        self._book.unshare(share.context_id)

    def unshared(self) -> list[str]:
        return self._book.take_unshared()

    def ask(self, asks: Sequence[DraftAsk]) -> None:
        self._book.asked(asks, self.state.epoch)
        if self._drafter is not None:
            drafter, end, asked = self._drafter, _End(self, self.state.epoch), tuple(asks)
            self._time.at(self._arrival(), lambda: drafter.ask(end, asked))

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        found = self._book.collect(asks, 0.0)
        missing = {(ask.context_id, ask.base) for ask in asks} - {(each.context_id, each.base) for each in found}
        if missing and timeout_s > 0 and self.state.linked:
            self._missing, epoch = missing, self.state.epoch
            self._process.wait(
                lambda: not self._missing or (self.state.linked, self.state.epoch) != (True, epoch), timeout_s
            )
            self._missing = set()
            found += self._book.collect(asks, 0.0)
        return found

    def close_contexts(self, context_ids: Sequence[str]) -> None:
        self._book.close(context_ids)
        if self._drafter is not None:
            drafter, end, closed = self._drafter, _End(self, self.state.epoch), tuple(context_ids)
            self._time.at(self._arrival(), lambda: drafter.close(end, closed))

    def evicted(self) -> list[str]:
        return self._book.take_evicted()

    def set_drafters(self, addresses: Sequence[str]) -> None:
        """The pool decides."""

    def stop(self) -> None:
        """Nothing runs."""

    # The pool's calls, and the drafter's.

    def connect(self, drafter: SimulatedDrafter) -> None:
        """A new epoch begins."""
        self._drafter = drafter
        block, epoch = self._wire.block_size, self.state.epoch + 1
        self.state = LinkState(
            True, epoch, drafter.name, "", block, drafter.window, self.state.sent_bytes, drafter.slots
        )
        self._book.begin(epoch)

    def disconnect(self) -> None:
        if self._drafter is not None:
            self._drafter.lost(_End(self, self.state.epoch))
        self._drafter = None
        self._book.end()
        self.state = replace(self.state, linked=False)
        self._process.notify()

    def answered(self, answers: Sequence[DraftAnswer]) -> None:
        self._book.deliver(answers)
        if self._missing:
            self._missing.difference_update((answer.context_id, answer.base) for answer in answers)
            if not self._missing:
                self._process.notify()

    def dropped(self, context_id: str) -> None:
        self._book.evict(context_id)

    def comes(self, epoch: int, message: Action) -> None:
        """Half a round trip later, if the epoch in which it was sent still is."""

        def arrive() -> None:
            if self.state.linked and self.state.epoch == epoch:
                message()

        self._time.at(self._time.now + self._wire.round_trip_s / 2, arrive)

    def _arrival(self) -> float:
        return max(self._time.now, self._free_at) + self._wire.round_trip_s / 2


@dataclass(frozen=True)
class _End:
    """One epoch of a link, as its drafter holds it."""

    link: SimulatedLink
    epoch: int

    @property
    def link_id(self) -> str:
        return f"{self.link.verifier}/{self.epoch}"

    def answered(self, answers: Sequence[DraftAnswer]) -> None:
        self.link.comes(self.epoch, lambda: self.link.answered(answers))

    def dropped(self, context_id: str) -> None:
        self.link.comes(self.epoch, lambda: self.link.dropped(context_id))


class Pool:
    """Pairs verifiers with drafters as their fronts do, at the start and whenever a drafter's silence is noticed."""

    def __init__(
        self, time: VirtualTime, drafters: Sequence[SimulatedDrafter], links: Sequence[SimulatedLink], silence_s: float
    ):
        self._time = time
        self._drafters = {drafter.name: drafter for drafter in drafters}
        self._links = {link.verifier: link for link in links}
        self.pair()
        for drafter in drafters:
            if drafter.dies_at < float("inf"):
                time.at(drafter.dies_at + silence_s, self.pair)

    def pair(self) -> None:
        alive = [name for name, drafter in self._drafters.items() if drafter.alive]
        linked = {name: link.state.drafter_id for name, link in self._links.items() if link.state.linked}
        chosen = assign(self._links, alive, linked)
        for name, link in self._links.items():
            if linked.get(name) == chosen.get(name):
                continue
            if name in linked:
                link.disconnect()
            if name in chosen:
                delay = REDIAL_S if self._time.now else 0.0
                self._time.at(self._time.now + delay, partial(link.connect, self._drafters[chosen[name]]))
