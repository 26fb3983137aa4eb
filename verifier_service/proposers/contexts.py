"""Requests as the drafter knows them: whose context features are sent, and of which positions.

A request that begins with the same tokens as another shares what the drafter has of that one: it is sent once.
New features follow each step. A context that the drafter knows nothing of any more is sent from the store, the newest
features first: drafts can begin at once, and get better as the older ones come, so many rows a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from cluster.link.face import LinkState, VerifierLink
from cluster.link.messages import Piece, Share
from verifier_service.feature_pages import Parts
from verifier_service.features import FeatureStore, spans
from verifier_service.proposers.context import Context
from verifier_service.proposers.room import Room
from verifier_service.proposers.sources import ClosedSources, best_source
from verifier_service.sequence import Key, Progress, RunningRequest

UNSENT_BYTES = 8 << 20  # while so much waits for the drafter, features go to the store only and are caught up later
NEWEST_ROWS = 256  # of a context that is sent again, and of each piece that follows
REBUILD_ROWS = 2048  # from the store in one step, of all contexts
UNFUSED_ROWS = 128  # of taps, at most, that wait to be fused with later ones: 9 MB of 5 x 7168 in bfloat16


class Fuser(Protocol):
    """taps [n, taps x hidden of the target] -> context features [n, hidden]."""

    @property
    def target_layer_ids(self) -> tuple[int, ...]: ...

    @property
    def block_size(self) -> int: ...

    def __call__(self, taps: torch.Tensor) -> torch.Tensor: ...


@dataclass(slots=True)
class Unfused:
    """Taps [n, taps x hidden] of steps whose features nobody has wanted yet, in order, and where those have to go."""

    taps: list[torch.Tensor] = field(default_factory=list)
    rows: int = 0
    parts: Parts = field(default_factory=Parts)


class Contexts:
    """All of one proposer's, oldest first. At most as many as the drafter has room for have a place with it.

    More would evict each other and be sent over and over; the others decode plainly until a place is free. Those that
    it turns away wait behind the others.
    window: features kept per request while no drafter has named its own.
    """

    def __init__(
        self,
        link: VerifierLink,
        fuser: Fuser,
        store: FeatureStore,
        verifier_id: str,
        window: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._link, self._fuser, self._store = link, fuser, store
        self._verifier_id, self._block_tokens = verifier_id, store.pages.page_tokens
        self._clock = clock
        self._window = window
        self._room = Room()
        self._taken = 0
        self._held: dict[Key, Context] = {}
        self._by_id: dict[str, Context] = {}
        self._unplaced: dict[Context, None] = {}  # an ordered set
        self._lagging: dict[Context, None] = {}  # an ordered set
        self._incomplete: dict[Context, None] = {}  # older features are missing; an ordered set
        self._unfused = Unfused()
        self._withheld = False  # features went to the store only since the last that were sent
        self._closed = ClosedSources()
        self.tokens_sent = self.tokens_shared = 0

    def of(self, progress: Sequence[Progress]) -> list[Context | None]:
        """For each of them its context, which begins here if it is new; None: it is over, or never drafted for."""
        held = self._held
        found: list[Context | None] = []
        for p in progress:
            if p.finish is None:
                context = held.get(p.sequence.key) or self._begin(p.sequence)
                found.append(context if context.limit else None)
            else:
                found.append(None)
        return found

    @property
    def placeless(self) -> bool:
        """Whether there are requests, none of which the drafter can be asked for: it has no room, or they want none."""
        return bool(self._held) and not self._taken

    def named(self, context_id: str) -> Context | None:
        return self._by_id.get(context_id)

    def new_epoch(self, state: LinkState) -> None:
        """Nothing that was sent before is there."""
        self._window = state.window or self._window
        self._room.begin(state.capacity_contexts)
        self._closed.begin(state.capacity_contexts)
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
        self._lagging.pop(context, None)
        self._incomplete.pop(context, None)
        if context.placed:
            context.placed = False
            self._taken -= 1
            self._unplaced[context] = None
            self._room.turned_away(self._taken, self._clock())
            self._link.close_contexts([context.context_id])  # what is on its way to the drafter is in vain

    def unshared(self, context: Context) -> None:
        """The drafter did not have what this one was to share: it is sent."""
        self._closed.drop(context.source)
        context.sent = context.hit = 0
        self._incomplete.pop(context, None)
        if context.placed:
            self._lagging[context] = None

    def forget(self, sequences: Sequence[RunningRequest]) -> list[Context]:
        """These requests are over; their contexts, where there were any."""
        gone = []
        for sequence in sequences:
            self._store.pages.forget(sequence.key)
            context = self._held.pop(sequence.key, None)
            if context is not None:
                gone.append(context)
                del self._by_id[context.context_id]
                self._lagging.pop(context, None)
                self._incomplete.pop(context, None)
                self._unplaced.pop(context, None)
                self._taken -= context.placed
                if context.placed and context.sent:
                    self._closed.add(context.as_source(self._window), self._block_tokens)
        # What was not sent in this epoch may still be known by its asks.
        if known := [context.context_id for context in gone if context.limit]:
            self._link.close_contexts(known)
        self._place()
        return gone

    def take(
        self, owners: Sequence[Context | None], progress: Sequence[Progress], taps: torch.Tensor, send: bool
    ) -> None:
        """Keep the committed rows' features, and send what is new to the drafter in one go.

        owners: as `of` has them. Of requests that are over, only what completes a cached block is kept.
        While nothing is sent, rows wait to be fused until there are UNFUSED_ROWS, or somebody wants to read them.
        """
        send = send and self._link.queued_bytes < UNSENT_BYTES
        if send and self._withheld:
            self._lagging.update((c, None) for c in self._held.values() if c.placed and c.sent < c.table.end)
        self._withheld = not send
        if self._unfused.rows and self._unfused.rows + taps.shape[0] > UNFUSED_ROWS:
            self._fuse()
        unfused = self._unfused
        pages, window = self._store.pages, self._window
        sources: list[int] = []  # of each request: its first row of the step that is fused, how many, and what of the
        counts: list[int] = []  # fused rows is kept where, and sent
        parts = unfused.parts
        of, at, kept_there = parts.of, parts.at, parts.counts
        pieces: list[Piece] = []
        sent: list[int] = []
        fused = unfused.rows
        for owner, p in zip(owners, progress):
            start, kept = p.start, p.kept
            first = fresh = 0
            if (
                owner is None
                or start != (table := owner.table).end
                or len((sequence := p.sequence).tokens) - start > window
            ):
                first, fresh = self._keep(owner, p, fused, parts)
                if first == kept:
                    continue
            elif kept < table.room:  # the usual: all rows are new, none is old, and they fill no page
                of.append(fused)
                at.append(table.extend(kept))
                kept_there.append(kept)
            else:
                pages.put(table, start, kept, window, sequence.hashes, parts, fused)
            if send and owner is not None:
                begin, stop = start + fresh, start + kept
                if begin != owner.sent or not begin:  # else all before was sent, which it is to none without a place
                    begin = self._unsent(owner, begin, stop)
                if begin < stop:
                    pieces.append(Piece(owner.context_id, begin, stop - begin))
                    sent.append(fused + begin - start - first)
                    if not owner.sent:
                        owner.lowest = begin
                    owner.sent = stop
            sources.append(p.row + first)
            counts.append(kept - first)
            fused += kept - first
        if not counts:
            return
        unfused.taps.append(_rows(taps, sources, counts))
        unfused.rows = fused
        if not pieces and fused < UNFUSED_ROWS:
            return
        features = self._fuse()
        if pieces:
            self._append(pieces, _rows(features, sent, [piece.count for piece in pieces]))

    def catch_up(self, chosen: Sequence[Context] | None = None) -> None:
        """Send lagging contexts what the store has, as fast as the drafter takes it in. chosen: to these alone."""
        if self._unplaced:
            self._place()
        left = REBUILD_ROWS
        for context in list(self._lagging) if chosen is None else [c for c in chosen if c in self._lagging]:
            if left <= 0 or self._link.queued_bytes >= UNSENT_BYTES:
                break
            del self._lagging[context]
            left -= self._send_newest(context)
        while self._incomplete and left > 0 and self._link.queued_bytes < UNSENT_BYTES:
            left -= self._send_older(next(iter(self._incomplete)))

    def _fuse(self) -> torch.Tensor:
        """All that waits for it, into the store. Returns the features [rows, hidden]."""
        unfused, self._unfused = self._unfused, Unfused()
        features = self._fuser(unfused.taps[0] if len(unfused.taps) == 1 else torch.cat(unfused.taps))
        self._store.write(features, unfused.parts)
        return features

    def _keep(self, owner: Context | None, p: Progress, fused: int, parts: Parts) -> tuple[int, int]:
        """Any rows: from which of them on they are wanted at all, and from which on they lie in the window.

        fused: how many rows of others are fused before them. Adds to `parts` where they are kept.
        """
        sequence, start, kept = p.sequence, p.start, p.kept
        if owner is not None:
            table = owner.table
            if start > table.end:
                self._find(owner, start)
        elif p.finish is not None and sequence.hashes and sequence.request.max_draft_tokens != 0:
            table = self._store.pages.of(sequence.key)
        else:
            return kept, kept
        old = min(max(len(sequence.tokens) - self._window - start, 0), kept)
        first = 0 if sequence.hashes else old  # a cached block's features are kept, however old
        names = sequence.hashes
        self._store.pages.put(table, start + first, kept - first, self._window, names, parts, fused)
        return first, old

    def _unsent(self, context: Context, start: int, stop: int) -> int:
        """From which position on rows start..stop-1 are to be sent now; `stop`: not at all."""
        if not context.placed or context in self._lagging or stop <= context.sent:
            return stop  # no room for it; caught up below, from the store; or computed again after a preemption
        if context.sent and start > context.sent:
            self._lagging[context] = None
            return stop
        return max(start, context.sent)

    def _find(self, context: Context, start: int) -> None:
        """A request that nothing is held of goes on at `start`: at a block boundary, after a prefix hit."""
        sequence, pages = context.sequence, self._store.pages
        if start % pages.page_tokens:  # it has run before, under a proposer that failed
            return
        wanted = start - max(len(sequence.tokens) - self._window, 0)
        found = wanted > 0 and pages.adopt(context.table, sequence.hashes[: start // pages.page_tokens], wanted)
        if found:
            context.hit = start
            if context.placed:
                self._lagging[context] = None

    def _begin(self, sequence: RunningRequest) -> Context:
        own = sequence.request.max_draft_tokens
        limit = self._fuser.block_size - 1 if own is None else min(own, self._fuser.block_size - 1)
        request_id, choice = sequence.key
        table = self._store.pages.of(sequence.key)
        context = Context(sequence, f"{self._verifier_id}/{request_id}/{choice}", limit, table)
        self._closed.drop(context.context_id)
        self._held[sequence.key] = self._by_id[context.context_id] = context
        if limit:
            self._unplaced[context] = None
            self._place()
        return context

    def _place(self) -> None:
        """Give free places to the oldest that have none."""
        now = self._clock()
        while self._unplaced and self._room.has_place(self._taken, now):
            context = next(iter(self._unplaced))
            del self._unplaced[context]
            context.placed = True
            self._taken += 1
            if context.table.end:
                self._lagging[context] = None

    def _send_newest(self, context: Context) -> int:
        """What follows the features that were sent, or the newest if there are none. Returns the number of rows."""
        end = context.table.end
        if not context.sent:
            self._share(context)
        if context.sent:
            return self._send_stored(context, context.sent, end)
        count = self._send_stored(context, end - min(NEWEST_ROWS, self._window), end)
        context.lowest = end - count
        self._incomplete[context] = None
        return count

    def _share(self, context: Context) -> None:
        """Let it begin with the rows of another that has the same prefix, if the drafter may hold such a one."""
        if not context.hit:
            return
        block = context.hit // self._block_tokens - 1
        name = context.sequence.hashes[block]
        others = [each.as_source(self._window) for each in self._held.values() if each.placed and each.has(block, name)]
        source = best_source([*others, *self._closed.all()], block, name, context.hit, self._block_tokens)
        if source is None:
            return
        start = max(source.first, context.table.end - self._window)
        if start >= context.hit:
            return
        self._link.share(Share(context.context_id, source.context_id, start, context.hit - start))
        self.tokens_shared += context.hit - start
        context.source, context.lowest, context.sent = source.context_id, start, context.hit
        self._incomplete[context] = None

    def _send_older(self, context: Context) -> int:
        """A piece below what was sent. Returns the number of rows."""
        end = context.lowest
        oldest = max(context.table.first, context.sent - self._window)
        count = self._send_stored(context, max(oldest, end - NEWEST_ROWS), end) if oldest < end else 0
        context.lowest = end - count
        if context.lowest <= oldest:
            del self._incomplete[context]
        return count

    def _send_stored(self, context: Context, start: int, end: int) -> int:
        if self._unfused.rows:
            self._fuse()
        start, rows = self._store.read(context.table, start, end)
        count = rows.shape[0]
        if count:
            self._append([Piece(context.context_id, start, count)], rows)
            context.sent = max(context.sent, start + count)
        return count

    def _append(self, pieces: list[Piece], rows: torch.Tensor) -> None:
        self._link.append(pieces, rows)
        self.tokens_sent += rows.shape[0]


def _rows(tensor: torch.Tensor, firsts: list[int], counts: list[int]) -> torch.Tensor:
    """Of each pair, in ascending order, the rows first .. first + count - 1; the tensor itself if that is all of it."""
    if sum(counts) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, torch.from_numpy(spans(firsts, counts)).to(tensor.device))
