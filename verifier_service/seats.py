"""Where the requests of a scheduler stand (waiting, prefilling, decoding) and what the running ones hold: slots, KV
blocks, checkpoints. Pure policy, no torch.

A request enters when a slot and the blocks of all its known tokens are there, with what the prefix cache has of them.
When a decoding request needs a block and none is free, the last in order gives up its own and waits again.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from verifier_service.prefix_cache import Hit, PrefixCache
from verifier_service.sequence import RunningRequest

DEFERRED = 8  # so many waiting requests may stand aside for a prompt that computes what they need, and let others pass


@dataclass(slots=True)
class Moves:
    """What the ranks have to be told of since the plan before; the fields are those of a StepPlan.

    saved: checkpoint -> (slot, kept): what is saved last counts.
    """

    new_blocks: list[tuple[int, int]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    restored: list[tuple[int, int]] = field(default_factory=list)
    saved: dict[int, tuple[int, int]] = field(default_factory=dict)


class Seats:
    """Three lists, each in order of priority and arrival. Only the first has requests without a slot."""

    def __init__(self, slots: int, block_tokens: int, cache: PrefixCache):
        self._cache = cache
        self._pool = cache.pool
        self._block_tokens = block_tokens
        self._free_slots = list(range(slots - 1, -1, -1))
        self._moves = Moves()
        self.waiting: list[RunningRequest] = []
        self.prefilling: list[RunningRequest] = []
        self.decoding: list[RunningRequest] = []
        self.preemptions = 0

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def take_moves(self) -> Moves:
        moves, self._moves = self._moves, Moves()
        return moves

    def queue(self, sequence: RunningRequest) -> None:
        insort(self.waiting, sequence, key=order_of)

    def leave(self, sequence: RunningRequest) -> None:
        """Wherever it stands; what it held is free."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def enter(self) -> None:
        """Waiting requests take slots and blocks, in order; none passes one for which there is no room."""
        deferred = 0
        for sequence in self.waiting[: len(self._free_slots) + DEFERRED]:
            if not self._free_slots:
                return
            hit = self._cache.match(sequence)  # of a long prompt, as long as a step's planning
            if not self._fits(sequence, hit):
                return
            if self._cache.is_coming(sequence, hit):
                deferred += 1
                if deferred > DEFERRED:
                    return
                continue
            self.waiting.remove(sequence)
            self._seat(sequence, hit)

    def promote(self) -> None:
        """Requests whose prompt is complete now decode."""
        ready = [s for s in self.prefilling if s.computed >= len(s.tokens) - 1]
        if ready:
            self.prefilling = [s for s in self.prefilling if s.computed < len(s.tokens) - 1]
            for sequence in ready:
                insort(self.decoding, sequence, key=order_of)

    def need_block(self, sequence: RunningRequest) -> None:
        """One more block for a decoding request, if need be from the last in order, which may be itself."""
        while not self._pool.free:
            victim = max((*self.decoding, *self.prefilling), key=order_of)
            self._preempt(victim)
            if victim is sequence:
                return
        self.grow(sequence, 1)

    def grow(self, sequence: RunningRequest, count: int) -> None:
        """Raises OutOfBlocksError."""
        blocks, slot = self._pool.allocate(count), sequence.slot
        sequence.blocks += blocks
        self._moves.new_blocks += [(slot, block) for block in blocks]

    def save(self, checkpoint: int, slot: int, kept: int) -> None:
        """As in StepPlan.saved."""
        self._moves.saved[checkpoint] = (slot, kept)

    def _seat(self, sequence: RunningRequest, hit: Hit) -> None:
        sequence.slot = self._free_slots.pop()
        checkpoint = self._cache.enter(sequence, hit)
        if checkpoint is not None:
            self._moves.restored.append((sequence.slot, checkpoint))
        self._moves.new_blocks.extend((sequence.slot, block) for block in sequence.blocks)
        self.grow(sequence, self._blocks_for(len(sequence.tokens)) - len(sequence.blocks))
        insort(self.prefilling, sequence, key=order_of)

    def _fits(self, sequence: RunningRequest, hit: Hit) -> bool:
        """With a block to spare for every running request: entering only to be preempted at once wastes a prefill."""
        running = len(self.decoding) + len(self.prefilling)
        fresh = self._blocks_for(len(sequence.tokens)) - len(hit.blocks)
        return fresh + running <= self._pool.free - hit.unused

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _preempt(self, sequence: RunningRequest) -> None:
        self.preemptions += 1
        if sequence in self.prefilling:
            checkpoint = self._cache.save_before_leaving(sequence)
            if checkpoint is not None:
                self.save(checkpoint, sequence.slot, 0)
        self._vacate(sequence)
        sequence.drafts = ()
        self.queue(sequence)

    def _vacate(self, sequence: RunningRequest) -> None:
        (self.decoding if sequence in self.decoding else self.prefilling).remove(sequence)
        self._cache.leave(sequence)
        self._moves.released.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1


def order_of(sequence: RunningRequest) -> tuple[int, int]:
    return sequence.order
