"""One request as the drafter knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.link.messages import DraftAsk
from verifier_service.block_hashes import BlockHash
from verifier_service.control import Trust
from verifier_service.feature_pages import PageTable
from verifier_service.proposers.sources import Source
from verifier_service.sequence import RunningRequest


@dataclass(slots=True, eq=False)
class Context:
    """One request. limit: drafts it may be asked for; 0 = none, and nothing is sent.

    table: where its features are in the store.
    placed: the drafter has room for it. sent: features of positions lowest..sent-1 were sent in this epoch.
    hit: where the prefix ends that it had in common with earlier requests; 0 = none, or its rows are not shared.
    source: whose rows it was to share. asked: the ask that is not answered yet, or None.
    confidence: of the drafts that the latest answer left to verify.
    """

    sequence: RunningRequest
    context_id: str
    limit: int
    table: PageTable
    placed: bool = False
    lowest: int = 0
    sent: int = 0
    hit: int = 0
    source: str = ""
    asked: DraftAsk | None = None
    confidence: tuple[float, ...] = ()
    trust: Trust = field(default_factory=Trust)

    @property
    def missing(self) -> int:
        """Tokens whose features would have to be sent before an ask."""
        return self.sequence.computed - self.sent

    def has(self, block: int, name: BlockHash) -> bool:
        """Whether features of the request's block of this number and name may have been sent."""
        hashes = self.sequence.hashes
        return self.sent > 0 and block < len(hashes) and hashes[block] == name

    def as_source(self, window: int) -> Source:
        """What the drafter holds of it, for others to share."""
        return Source(self.context_id, max(self.lowest, self.sent - window), self.sent, 0, self.sequence.hashes)
