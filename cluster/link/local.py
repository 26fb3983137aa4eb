"""A link within one process: the same face, no sockets, no threads of its own. For colocated drafting and for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cluster.link.answers import AnswerBook
from cluster.link.face import DrafterHandler, LinkState
from cluster.link.messages import PROTOCOL, Draft, DraftAnswer, DraftAsk, Heartbeat, Hello, Mark, Piece, Share
from cluster.link.planes import DTYPES, parted


class LocalPeer:
    """The verifier as the handler sees it. Answers may come from any thread, inside `draft` or later."""

    link_id = "local#1"

    def __init__(self, book: AnswerBook):
        self._book = book

    def answer(self, answers: Sequence[DraftAnswer]) -> None:
        self._book.deliver(answers)

    def ack(self, marks: Sequence[Mark]) -> None:
        return  # nothing is in flight within one process

    def evicted(self, context_id: str) -> None:
        self._book.evict(context_id)

    def unshared(self, context_id: str) -> None:
        self._book.unshare(context_id)


class LocalLink:
    """A VerifierLink that calls its handler directly. One epoch, which lasts until `stop`.

    Features reach the handler in `dtype` on their own device; without a cast they are the caller's own tensor, which
    must then not be changed. load: the drafter's word on itself. Raises LinkError if the handler refuses the hello:
    both halves are one process's own configuration, so there is nothing to wait for.
    """

    def __init__(
        self,
        handler: DrafterHandler,
        *,
        verifier_id: str = "local",
        target_fingerprint: str = "",
        feature_version: str = "",
        hidden: int = 0,
        vocabulary: int = 1 << 31,
        dtype: str = "float32",
        load: Callable[[], Heartbeat] = Heartbeat,
    ):
        hello = Hello(
            protocol=PROTOCOL,
            verifier_id=verifier_id,
            epoch=1,
            target_fingerprint=target_fingerprint,
            feature_version=feature_version,
            hidden=hidden,
            vocabulary=vocabulary,
            dtype=dtype,
            tensor_transport="local",
        )
        self._handler, self._load = handler, load
        self._dtype = DTYPES[dtype]
        self._book = AnswerBook(vocabulary)
        welcome = handler.hello(hello)
        self._book.begin(1)
        self._peer = LocalPeer(self._book)
        self._sent_bytes = 0
        self._linked = True
        self._welcome = welcome
        handler.linked(self._peer)

    @property
    def state(self) -> LinkState:
        return LinkState(
            linked=self._linked,
            epoch=1,
            drafter_id=self._welcome.drafter_id,
            drafter_version=self._welcome.drafter_version,
            block_size=self._welcome.block_size,
            window=self._welcome.window,
            sent_bytes=self._sent_bytes,
            capacity_contexts=self._welcome.capacity_contexts,
        )

    @property
    def counters(self) -> dict[str, int]:
        return dict(self._book.counters)

    @property
    def drafter_load(self) -> Heartbeat:
        return self._load()

    @property
    def queued_bytes(self) -> int:
        return 0

    def append(self, pieces: Sequence[Piece], features: torch.Tensor) -> None:
        if not self._linked or features.shape[0] == 0:
            return
        rows = features.detach().to(self._dtype)
        self._sent_bytes += rows.nbytes
        for piece, own in parted(pieces, rows):
            self._handler.append(self._peer, piece.context_id, piece.start, own)

    def share(self, share: Share) -> None:
        if self._linked:
            self._handler.share(self._peer, share)

    def ask(self, asks: Sequence[DraftAsk]) -> None:
        self._book.asked(asks, 1)
        if self._linked and asks:
            self._handler.draft(self._peer, Draft(tuple(asks)))

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        return self._book.collect(asks, timeout_s)

    def close_contexts(self, context_ids: Sequence[str]) -> None:
        self._book.close(context_ids)
        if self._linked and context_ids:
            self._handler.close_contexts(self._peer, context_ids)

    def evicted(self) -> list[str]:
        return self._book.take_evicted()

    def unshared(self) -> list[str]:
        return self._book.take_unshared()

    def set_drafters(self, addresses: Sequence[str]) -> None:
        """Ignored: the drafter is in this process."""

    def stop(self) -> None:
        if self._linked:
            self._linked = False
            self._book.end()
            self._handler.lost(self._peer)
