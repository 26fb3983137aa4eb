"""Which contexts a drafter holds, or may still hold, that a new one can share its first tokens with. No torch.

Two requests that have a block of one name have the same tokens up to its end (see block_hashes), and so the same rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from verifier_service.block_hashes import BlockHash

MOST = 1024  # closed contexts that are remembered, whatever room a drafter says it has


@dataclass(frozen=True, slots=True)
class Source:
    """Features of positions first..end-1 were sent. names: of the request's blocks, from number `block` on."""

    context_id: str
    first: int
    end: int
    block: int
    names: Sequence[BlockHash]

    def has(self, block: int, name: BlockHash) -> bool:
        return 0 <= block - self.block < len(self.names) and self.names[block - self.block] == name


class ClosedSources:
    """Of requests that are over, the last `most`; the drafter keeps theirs until it needs the room."""

    def __init__(self) -> None:
        self._most = 0
        self._sources: OrderedDict[str, Source] = OrderedDict()

    def begin(self, most: int) -> None:
        """Another drafter, or another epoch."""
        self._most = min(most, MOST)
        self._sources.clear()

    def add(self, source: Source, block_tokens: int) -> None:
        """source: of all the request's blocks. Only those count of which all was sent."""
        block = -(-source.first // block_tokens)
        names = tuple(source.names[block : source.end // block_tokens])
        if names:
            self._sources[source.context_id] = replace(source, block=block, names=names)
            if len(self._sources) > self._most:
                self._sources.popitem(last=False)

    def drop(self, context_id: str) -> None:
        """The drafter has it no more. Unknown ones are ignored."""
        self._sources.pop(context_id, None)

    def all(self) -> list[Source]:
        return list(self._sources.values())


def best_source(sources: Sequence[Source], block: int, name: BlockHash, end: int, least: int) -> Source | None:
    """The one that has most of what comes before `end`, which is where block number `block`, of this name, ends.

    least: positions that are worth it.
    """
    fitting = [each for each in sources if each.first + least <= end <= each.end and each.has(block, name)]
    return min(fitting, key=lambda each: each.first, default=None)
