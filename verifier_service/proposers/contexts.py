"""Requests as the drafter knows them: whose context features are sent, and of which positions.

New features follow each step. A context that the drafter knows nothing of any more is sent from the store, the newest
features first: drafts can begin at once, and get better as the older ones come, so many rows a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from cluster.link.face import LinkState, VerifierLink
from cluster.link.messages import DraftAsk
from verifier_service.features import FeatureStore
from verifier_service.proposers.room import Room
from verifier_service.sequence import Key, Progress, RunningRequest

UNSENT_BYTES = 8 << 20  # while so much waits for the drafter, features go to the store only and are caught up later
NEWEST_ROWS = 256  # of a context that is sent again, and of each piece that follows
REBUILD_ROWS = 2048  # from the store in one step, of all contexts


class Fuser(Protocol):
    """taps [n, taps x hidden of the target] -> context features [n, hidden]."""

    @property
    def target_layer_ids(self) -> tuple[int, ...]: ...

    @property
    def block_size(self) -> int: ...

    def __call__(self, taps: torch.Tensor) -> torch.Tensor: ...


@dataclass(slots=True, eq=False)
class Context:
    """One request. limit: drafts it may be asked for; 0 = none, and nothing is sent.

    placed: the drafter has room for it. sent: features of positions lowest..sent-1 were sent in this epoch.
    asked: the ask that is not answered yet, or None.
    """

    sequence: RunningRequest
    context_id: str
    limit: int
    placed: bool = False
    lowest: int = 0
    sent: int = 0
    asked: DraftAsk | None = None

    @property
    def missing(self) -> int:
        """Tokens whose features would have to be sent before an ask."""
        return self.sequence.computed - self.sent


class Contexts:
    """All of one proposer's, oldest first. At most as many as the drafter has room for have a place with it.

    More would evict each other and be sent over and over; the others decode plainly until a place is free. Those that
    it turns away wait behind the others.
    window: features kept per request while no drafter has named its own.
    """

    def __init__(self, link: VerifierLink, fuser: Fuser, store: FeatureStore, verifier_id: str, window: int):
        self._link, self._fuser, self._store = link, fuser, store
        self._verifier_id = verifier_id
        self._window = window
        self._room = Room()
        self._taken = 0
        self._held: dict[Key, Context] = {}
        self._by_id: dict[str, Context] = {}
        self._unplaced: dict[Context, None] = {}  # an ordered set
        self._lagging: set[Context] = set()
        self._incomplete: dict[Context, None] = {}  # older features are missing; an ordered set
        self.tokens_sent = 0

    def of(self, sequence: RunningRequest) -> Context:
        """This request's, which begins here if it is new."""
        return self._held.get(sequence.key) or self._begin(sequence)

    def named(self, context_id: str) -> Context | None:
        return self._by_id.get(context_id)

    def new_epoch(self, state: LinkState) -> None:
        """Nothing that was sent before is there."""
        self._window = state.window or self._window
        self._room.begin(state.capacity_contexts)
        self._taken = 0
        self._unplaced.clear()
        self._lagging.clear()
        self._incomplete.clear()
        for context in self._held.values():
            context.placed = False
            if context.limit:
                self._unplaced[context] = None
            context.sent, context.asked = 0, None
        self._place()

    def turned_away(self, context: Context) -> None:
        """The drafter holds nothing of this one, for want of room: it loses its place."""
        context.sent, context.asked = 0, None
        self._lagging.discard(context)
        self._incomplete.pop(context, None)
        if context.placed:
            context.placed = False
            self._taken -= 1
            self._unplaced[context] = None
            self._room.turned_away(self._taken, time.monotonic())
            self._link.close_contexts([context.context_id])  # what is on its way to the drafter is in vain

    def forget(self, sequences: Sequence[RunningRequest]) -> list[Context]:
        """These requests are over; their contexts, where there were any."""
        gone = []
        for sequence in sequences:
            self._store.forget(sequence.key)
            context = self._held.pop(sequence.key, None)
            if context is not None:
                gone.append(context)
                del self._by_id[context.context_id]
                self._lagging.discard(context)
                self._incomplete.pop(context, None)
                self._unplaced.pop(context, None)
                self._taken -= context.placed
        # What was not sent in this epoch may still be known by its asks.
        if known := [context.context_id for context in gone if context.limit]:
            self._link.close_contexts(known)
        self._place()
        return gone

    def hold_back(self, contexts: Iterable[Context]) -> None:
        """Nothing is sent for these until the next catch_up."""
        self._lagging.update(context for context in contexts if context.placed)

    def take(
        self, moved: list[tuple[Context, Progress]], ended: list[Progress], taps: torch.Tensor, send: bool
    ) -> None:
        """Fuse the committed rows in one go, keep them, and send each context its own.

        ended: of requests that are over; only what completes a cached block of theirs is kept.
        """
        wanted: list[tuple[Context | None, Progress, int]] = []  # progress: from which of its rows on
        for context, progress in moved:
            sequence = context.sequence
            if progress.start > self._store.end(sequence.key):
                self._find(context, progress.start)
            first = 0 if sequence.hashes else self._before_window(sequence, progress)
            if first < progress.kept:
                wanted.append((context, progress, first))
        if ended:
            wanted += [(None, progress, 0) for progress in ended if progress.sequence.hashes]
            wanted.sort(key=lambda want: want[1].row)
        if not wanted:
            return
        firsts = [progress.row + first for _, progress, first in wanted]
        counts = [progress.kept - first for _, progress, first in wanted]
        if sum(counts) != taps.shape[0]:
            taps = taps.index_select(0, _ranges(firsts, counts).to(taps.device))
        features = self._fuser(taps)
        stored = features.cpu()  # the same tensor on a CPU
        own_rows = stored.split(counts)
        sent_rows = own_rows if stored is features else features.split(counts)
        for (owner, progress, first), own, sent in zip(wanted, own_rows, sent_rows):
            sequence = progress.sequence
            self._store.put_blocks(sequence.key, progress.start + first, own, sequence.hashes)
            if owner is not None:
                old = self._before_window(sequence, progress) - first
                self._keep(sequence, progress.start + first, own, old)
                if send and old < own.shape[0]:
                    self._send_new(owner, progress.start + first + old, own.shape[0] - old, sent[old:])

    def catch_up(self, chosen: Sequence[Context] | None = None) -> None:
        """Send lagging contexts what the store has, as fast as the drafter takes it in. chosen: to these alone."""
        if self._unplaced:
            self._place()
        left = REBUILD_ROWS
        lagging = self._lagging if chosen is None else self._lagging.intersection(chosen)
        while lagging and left > 0 and self._link.queued_bytes < UNSENT_BYTES:
            context = lagging.pop()
            self._lagging.discard(context)
            left -= self._send_newest(context)
        while self._incomplete and left > 0 and self._link.queued_bytes < UNSENT_BYTES:
            left -= self._send_older(next(iter(self._incomplete)))

    def _keep(self, sequence: RunningRequest, start: int, rows: torch.Tensor, old: int) -> None:
        """The first `old` rows lie before the window; of them only those of a block that is not full yet are kept."""
        count = rows.shape[0]
        if old > 0 and sequence.hashes:
            begun = (start + count) % self._store.block_tokens
            old = max(min(old, count - begun), 0)
        if old < count:
            self._store.put(sequence.key, start + old, rows[old:], self._window)

    def _find(self, context: Context, start: int) -> None:
        """A request that nothing is held of goes on at `start`, a block boundary: after a prefix hit."""
        sequence = context.sequence
        wanted = start - max(len(sequence.tokens) - self._window, 0)
        if wanted > 0:
            found = sequence.hashes[: start // self._store.block_tokens]
            if self._store.put_from_blocks(sequence.key, found, wanted) and context.placed:
                self._lagging.add(context)

    def _before_window(self, sequence: RunningRequest, progress: Progress) -> int:
        """How many of these rows lie before the window of what is known of the request."""
        return min(max(len(sequence.tokens) - self._window - progress.start, 0), progress.kept)

    def _begin(self, sequence: RunningRequest) -> Context:
        own = sequence.request.max_draft_tokens
        limit = self._fuser.block_size - 1 if own is None else min(own, self._fuser.block_size - 1)
        request_id, choice = sequence.key
        context = Context(sequence, f"{self._verifier_id}/{request_id}/{choice}", limit)
        self._held[sequence.key] = self._by_id[context.context_id] = context
        if limit:
            self._unplaced[context] = None
            self._place()
        return context

    def _place(self) -> None:
        """Give free places to the oldest that have none."""
        now = time.monotonic()
        while self._unplaced and self._room.has_place(self._taken, now):
            context = next(iter(self._unplaced))
            del self._unplaced[context]
            context.placed = True
            self._taken += 1
            if self._store.end(context.sequence.key):
                self._lagging.add(context)

    def _send_new(self, context: Context, start: int, count: int, rows: torch.Tensor) -> None:
        if not context.placed or context in self._lagging or start + count <= context.sent:
            return  # no room for it; caught up below, from the store; or computed again after a preemption
        if (context.sent and start > context.sent) or self._link.queued_bytes >= UNSENT_BYTES:
            self._lagging.add(context)
            return
        if start < context.sent:
            rows, start, count = rows[context.sent - start :], context.sent, start + count - context.sent
        self._append(context, start, count, rows)

    def _send_newest(self, context: Context) -> int:
        """What follows the features that were sent, or the newest if there are none. Returns the number of rows."""
        end = self._store.end(context.sequence.key)
        if context.sent:
            return self._send_stored(context, context.sent, end)
        count = self._send_stored(context, end - NEWEST_ROWS, end)
        context.lowest = end - count
        self._incomplete[context] = None
        return count

    def _send_older(self, context: Context) -> int:
        """A piece below what was sent. Returns the number of rows."""
        end = context.lowest
        oldest = max(self._store.first(context.sequence.key), context.sent - self._window)
        count = self._send_stored(context, max(oldest, end - NEWEST_ROWS), end) if oldest < end else 0
        context.lowest = end - count
        if context.lowest <= oldest:
            del self._incomplete[context]
        return count

    def _send_stored(self, context: Context, start: int, end: int) -> int:
        start, pieces = self._store.between(context.sequence.key, start, end)
        if not pieces:
            return 0
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        self._append(context, start, rows.shape[0], rows)
        return rows.shape[0]

    def _append(self, context: Context, start: int, count: int, rows: torch.Tensor) -> None:
        self._link.append(context.context_id, start, rows)
        self.tokens_sent += count
        context.sent = max(context.sent, start + count)


def _ranges(firsts: list[int], counts: list[int]) -> torch.Tensor:
    """int64: first .. first + count - 1 of each pair, one after the other."""
    lengths = np.array(counts)
    before = lengths.cumsum() - lengths
    return torch.from_numpy(np.repeat(np.array(firsts) - before, lengths) + np.arange(int(lengths.sum())))
