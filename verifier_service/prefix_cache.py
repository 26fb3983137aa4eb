"""What of a request is computed already, and what of it will be worth finding again. Pure policy, no torch.

A request enters with the longest prefix that it can go on from: whole KV blocks, found by their hashes, and for a
target with recurrent state (Gated DeltaNet) a checkpoint of that state at their end. Its own blocks are named as they
fill up, prompt and output alike, so that the next turn of a conversation, a preempted request and a resumed one find
them. Checkpoints are taken at a prompt's last block boundary, where a prompt parts from cached text for the first
time, and, one that moves along for each request, at the last block boundary of its output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from verifier_service.block_hashes import BlockHash, extend
from verifier_service.blocks import BlockPool
from verifier_service.checkpoints import CheckpointPool
from verifier_service.sequence import RunningRequest


@dataclass(frozen=True, slots=True)
class Hit:
    """blocks: those to go on from. beyond: cached ones after them that no checkpoint leads to.

    unused: how many of `blocks` have no user, and so count as free until the request enters.
    """

    blocks: Sequence[int] = ()
    beyond: Sequence[int] = ()
    unused: int = 0


_MISS = Hit()


class PrefixCache:
    """Names the blocks of `pool`, which it makes. checkpoints: None for a target without recurrent state.

    evicted: hashes whose block is gone since take_evicted, for whoever keeps something beside blocks.
    """

    def __init__(self, blocks: int, block_tokens: int, *, enabled: bool = True, checkpoints: int | None = None):
        self.pool = BlockPool(blocks, self._on_evict)
        self.checkpoints = CheckpointPool(checkpoints or 0)
        self.queried_tokens = self.hit_tokens = 0
        self._block_tokens = block_tokens
        self._recurrent = checkpoints is not None
        self._enabled = enabled and checkpoints != 0
        self._moving = 0
        self._coming: dict[BlockHash, RunningRequest] = {}
        self.evicted: list[BlockHash] = []

    def match(self, sequence: RunningRequest) -> Hit:
        """What a waiting request would enter with now. Its last token is never part of it: its logits are wanted."""
        if not self._enabled:
            return _MISS
        last = (len(sequence.tokens) - 1) // self._block_tokens
        extend(sequence.hashes, sequence.request.cache_salt, sequence.tokens, self._block_tokens, last)
        found: list[int] = []
        for block_hash in sequence.hashes[:last]:
            block = self.pool.find(block_hash)
            if block is None:
                break
            found.append(block)
        count = len(found)
        if self._recurrent:
            while count and sequence.hashes[count - 1] not in self.checkpoints:
                count -= 1
        blocks = found[:count]
        return Hit(blocks, found[count:], sum(not self.pool.users(block) for block in blocks))

    def is_coming(self, sequence: RunningRequest, hit: Hit) -> bool:
        """Whether a request before this one computes right now what this one misses: it had better wait for that."""
        last = (len(sequence.tokens) - 1) // self._block_tokens
        if not self._coming or len(hit.blocks) >= last:
            return False
        other = self._coming.get(sequence.hashes[last - 1 if self._recurrent else len(hit.blocks)])
        return other is not None and other.order < sequence.order

    def enter(self, sequence: RunningRequest, hit: Hit) -> int | None:
        """Give a request what was found. Returns the checkpoint to restore its recurrent state from, if any."""
        self.pool.touch(reversed(hit.beyond))
        self.pool.share(hit.blocks)
        count = len(hit.blocks)
        sequence.blocks = list(hit.blocks)
        sequence.computed = sequence.cached = count * self._block_tokens
        if not self._enabled:
            return None
        self._count_named(sequence, count)
        self.queried_tokens += len(sequence.tokens)
        self.hit_tokens += sequence.computed
        last = (len(sequence.tokens) - 1) // self._block_tokens
        if not self._recurrent:
            self._announce(sequence, sequence.hashes[count:last])
            return None
        parting = count + len(hit.beyond)
        splits = [at for at in sorted({parting, last}) if at > count]
        sequence.splits = [at * self._block_tokens for at in splits]
        self._announce(sequence, [sequence.hashes[at - 1] for at in splits])
        return self.checkpoints.use(sequence.hashes[count - 1]) if count else None

    def name(self, sequence: RunningRequest) -> bool:
        """After a commit: blocks that are full now can be found. Whether there were any."""
        full = min(sequence.computed, len(sequence.tokens)) // self._block_tokens
        if full <= sequence.named:  # a stop token cut off what came after it
            return False
        extend(sequence.hashes, sequence.request.cache_salt, sequence.tokens, self._block_tokens, full)
        for index in range(sequence.named, full):
            self.pool.cache(sequence.blocks[index], sequence.hashes[index])
            if self._coming:
                self._arrived(sequence, sequence.hashes[index])
        self._count_named(sequence, full)
        return True

    def move_checkpoint(self, sequence: RunningRequest) -> int | None:
        """Where to save the state at the end of the request's named blocks, in place of where it was saved before.

        None: nowhere. At most half of all checkpoints move, so that running requests do not push out all others.
        """
        if not self._recurrent or not self._enabled:
            return None
        here = sequence.hashes[sequence.named - 1]
        if here in self.checkpoints:
            return None
        if sequence.moving is not None:
            self.checkpoints.drop(sequence.moving)
        elif self._moving < self.checkpoints.total // 2:
            self._moving += 1
        else:
            return None
        checkpoint = self.checkpoints.take()
        if checkpoint is None:
            self.stay(sequence)
            return None
        self.checkpoints.keep(checkpoint, here)
        sequence.moving = here
        return checkpoint

    def stay(self, sequence: RunningRequest) -> None:
        """The request's checkpoint moves no more: it is one like all others."""
        if sequence.moving is not None:
            sequence.moving = None
            self._moving -= 1

    def keep_checkpoint(self, sequence: RunningRequest, checkpoint: int, tokens: int) -> None:
        """A taken checkpoint holds the state after `tokens` tokens, a block boundary."""
        self.checkpoints.keep(checkpoint, sequence.hashes[tokens // self._block_tokens - 1])

    def save_before_leaving(self, sequence: RunningRequest) -> int | None:
        """Where to save the state of a request that is preempted in its prefill; None: nowhere, or not worth it."""
        at, inside = divmod(sequence.computed, self._block_tokens)
        if not self._recurrent or not self._enabled or inside or not at:
            return None
        if sequence.hashes[at - 1] in self.checkpoints:
            return None
        checkpoint = self.checkpoints.take()
        if checkpoint is not None:
            self.checkpoints.keep(checkpoint, sequence.hashes[at - 1])
        return checkpoint

    def leave(self, sequence: RunningRequest) -> None:
        """The request holds nothing any more; what is named stays to be found, its end to be forgotten first."""
        self.stay(sequence)
        if self._coming:
            for block_hash in sequence.hashes[sequence.named :]:
                self._arrived(sequence, block_hash)
        self.pool.release(reversed(sequence.blocks))
        sequence.blocks, sequence.splits = [], []
        sequence.computed = sequence.named = 0
        sequence.name_at = sys.maxsize

    def disown(self, sequence: RunningRequest) -> None:
        """What the request computed is no good: nobody shall find it."""
        self.pool.forget(sequence.blocks)

    def counters(self) -> dict[str, float]:
        """For Status: tokens looked up and found, what had to go for something else, what is there now."""
        pool, checkpoints = self.pool, self.checkpoints
        return {
            "prefix_queried_tokens": float(self.queried_tokens),
            "prefix_hit_tokens": float(self.hit_tokens),
            "cached_blocks": float(pool.cached),
            "evicted_blocks": float(pool.evictions),
            "checkpoints": float(checkpoints.total),
            "checkpoints_kept": float(checkpoints.kept),
            "evicted_checkpoints": float(checkpoints.evictions),
        }

    def take_evicted(self) -> list[BlockHash]:
        evicted, self.evicted = self.evicted, []
        return evicted

    def _count_named(self, sequence: RunningRequest, count: int) -> None:
        sequence.named, sequence.name_at = count, (count + 1) * self._block_tokens

    def _announce(self, sequence: RunningRequest, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            self._coming.setdefault(block_hash, sequence)

    def _arrived(self, sequence: RunningRequest, block_hash: BlockHash) -> None:
        if self._coming.get(block_hash) is sequence:
            del self._coming[block_hash]

    def _on_evict(self, block_hash: BlockHash) -> None:
        self.checkpoints.drop(block_hash)
        self.evicted.append(block_hash)
