"""The two faces of a link. Whatever the tensor plane (tcp, torch, local), both services see only these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    import torch

from cluster.link.messages import Draft, DraftAnswer, DraftAsk, Heartbeat, Hello, Mark, Piece, Share, Welcome


class LinkState(msgspec.Struct, frozen=True):  # made several times a step, in a tenth of a dataclass's time
    """What the verifier's side knows of its link. epoch counts up with every new connection; linked: may ask.

    drafter_*: from the Welcome of this epoch (empty while never linked). sent_bytes: bytes of both planes, all epochs.
    """

    linked: bool
    epoch: int
    drafter_id: str = ""
    drafter_version: str = ""
    block_size: int = 0
    window: int = 0
    sent_bytes: int = 0
    capacity_contexts: int = 0  # contexts that the drafter holds at a time; 0 = unknown


class VerifierLink(Protocol):
    """The verifier's end. No call blocks on the network and none raises because of the peer: a dead link swallows.

    After every change of `state.epoch` nothing that was sent before is known to the drafter: append again.
    """

    @property
    def state(self) -> LinkState: ...

    @property
    def drafter_load(self) -> Heartbeat:
        """What the drafter said of itself last, in any epoch."""

    @property
    def queued_bytes(self) -> int:
        """What waits for the drafter to read it: by this, appends after a new epoch are rationed."""

    def append(self, pieces: Sequence[Piece], features: torch.Tensor) -> None:
        """Send context features [rows, hidden] (any float dtype; cast to the link's), piece after piece."""

    def share(self, share: Share) -> None:
        """Let a new context begin with what the drafter holds of another, in place of an append."""

    def ask(self, asks: Sequence[DraftAsk]) -> None:
        """Ask for drafts of one step; earlier appends of the same contexts are applied first."""

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        """Wait until every ask is answered, the link breaks or timeout_s passes; the answers that have come.

        An answer is handed out once. Answers that nobody collects are dropped when their context closes or moves on.
        """

    def close_contexts(self, context_ids: Sequence[str]) -> None: ...

    def evicted(self) -> list[str]:
        """Contexts the drafter dropped since the last call."""

    def unshared(self) -> list[str]:
        """Contexts, since the last call, of which the drafter did not have what they were to share."""

    def set_drafters(self, addresses: Sequence[str]) -> None:
        """Candidates "host:port", best first. The live link is kept while its address is still listed."""

    def stop(self) -> None: ...


class Peer(Protocol):
    """One linked verifier, as the drafter's engine sees it. Sends never block: a slow peer is dropped instead."""

    @property
    def link_id(self) -> str:
        """Unique for one epoch of one verifier."""

    def answer(self, answers: Sequence[DraftAnswer]) -> None: ...

    def ack(self, marks: Sequence[Mark]) -> None: ...

    def evicted(self, context_id: str) -> None: ...

    def unshared(self, context_id: str) -> None: ...


class DrafterHandler(Protocol):
    """The drafter's side of the protocol. Called from the link's threads: implementations only queue.

    `hello` returns the Welcome or raises LinkError with the reason (which field, both values).
    """

    def hello(self, hello: Hello) -> Welcome: ...

    def linked(self, peer: Peer) -> None: ...

    def append(self, peer: Peer, context_id: str, start: int, features: torch.Tensor) -> None:
        """Of one context: what a verifier sends together comes in as many calls."""

    def share(self, peer: Peer, share: Share) -> None: ...

    def draft(self, peer: Peer, draft: Draft) -> None: ...

    def close_contexts(self, peer: Peer, context_ids: Sequence[str]) -> None: ...

    def lost(self, peer: Peer) -> None: ...
