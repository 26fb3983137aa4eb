"""The drafter's engine: link threads queue, one thread drafts for all linked verifiers together.

A pass takes everything that is queued: all appends become context KV in one GEMM, all asks that are ready become one
forward, and each verifier gets its answers in one frame. What cannot be drafted is answered empty, never late.
"""

from __future__ import annotations

import logging
import math
import statistics
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch

from cluster.errors import LinkError
from cluster.link.face import Peer
from cluster.link.messages import (
    MAX_ENTRIES,
    PROTOCOL,
    Draft,
    DraftAnswer,
    DraftAsk,
    DraftTotals,
    Heartbeat,
    Hello,
    Mark,
    Share,
    Welcome,
)
from drafter_service.attention import Block
from drafter_service.blocks import BlockDrafter, BlockDrafting
from drafter_service.config import DrafterSettings
from drafter_service.context import MAX_POSITION, Context, ContextTable, Key
from drafter_service.inbox import Appended, Asked, Closed, Dropped, Event, Inbox, Linked, Lost, Shared
from drafter_service.loading import LoadedDrafter, load_drafter
from drafter_service.profile import measured_memory
from drafter_service.sizing import ON_CPU, ContextSize, chosen_contexts
from modeling.memory_meter import CudaMeter

log = logging.getLogger(__name__)

INLINE_BYTES = 16 << 20  # without a thread, features are applied when so many wait, asked for or not
STOP_S = 10.0
CURES = {
    "protocol": "upgrade the older end",
    "target_fingerprint": "give both services the same target checkpoint",
    "feature_version": "give both services the same drafter checkpoint",
    "hidden": "give both services the same drafter checkpoint",
    "vocabulary": "give both services the same target checkpoint",
}


class DrafterEngine:
    """A cluster.link.face.DrafterHandler. Raises ConfigError if the checkpoints cannot be served.

    threaded=False: no thread of its own; asks are drafted and answered inside `draft`, on the caller's thread.
    on_failure: called once, on the engine's thread, with the error that ended it; nothing is drafted afterwards.
    """

    def __init__(
        self,
        settings: DrafterSettings,
        *,
        threaded: bool = True,
        drafter_id: str = "",
        on_failure: Callable[[Exception], None] | None = None,
    ):
        self._loaded = load_drafter(settings)
        self._max_contexts = _contexts(self._loaded, settings)
        self._drafter = block_drafter(self._loaded, self._max_contexts)
        self._table = ContextTable(self._max_contexts, self._loaded.window)
        self._inbox = Inbox(settings.max_queue)
        self._on_failure = on_failure
        self._peers: dict[str, Peer] = {}
        self._seconds: deque[float] = deque(maxlen=64)
        self._busy, self._measured = 0.0, time.monotonic()
        self.drafter_id = drafter_id or f"drafter-{uuid.uuid4().hex[:12]}"
        self._moved: dict[Key, Context] = {}  # whose watermark the current pass moves
        self._turned_away: dict[Key, None] = {}  # in the current pass, for want of room
        self._counters: Counter[str] = Counter(asks=0, empty=0, evicted=0, turned_away=0, invalid=0)
        self._counters.update(shared_rows=0, unshared=0, steps=0, drafts=0, appended_rows=0)
        self._busy_seconds = 0.0  # in all, as _busy is since the last heartbeat
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="drafter-engine", daemon=True)
            self._thread.start()

    # The link's calls: one verifier's come one after another, different verifiers' from different threads.

    def hello(self, hello: Hello) -> Welcome:
        for field, own in {"protocol": PROTOCOL, **self.identity}.items():
            value = getattr(hello, field)
            if value != own:
                raise LinkError(f"{field} is {value!r}, this drafter's is {own!r}: {CURES[field]}")
        loaded = self._loaded
        return Welcome(
            self.drafter_id, loaded.drafter_version, loaded.config.block_size, self._max_contexts, loaded.window
        )

    def linked(self, peer: Peer) -> None:
        self._inbox.linked(peer)

    def append(self, peer: Peer, context_id: str, start: int, features: torch.Tensor) -> None:
        if self._thread is None and self._inbox.bytes > INLINE_BYTES:
            self.run_once()
        self._inbox.append(peer, context_id, start, features)

    def share(self, peer: Peer, share: Share) -> None:
        if not self._inbox.share(peer, share):
            peer.unshared(share.context_id)

    def draft(self, peer: Peer, draft: Draft) -> None:
        refused = self._inbox.draft(peer, draft.asks)
        if refused:
            peer.answer([_empty(ask) for ask in refused])
        if self._thread is None:
            self.run_once()

    def close_contexts(self, peer: Peer, context_ids: Sequence[str]) -> None:
        self._inbox.close_contexts(peer, context_ids)

    def lost(self, peer: Peer) -> None:
        self._inbox.lost(peer)
        if self._thread is None:
            self.run_once()

    # The owner's calls.

    @property
    def identity(self) -> dict[str, Any]:
        """The fields of a Hello that this drafter insists on: what a link in the same process says of itself."""
        loaded = self._loaded
        return {
            "target_fingerprint": loaded.target_fingerprint,
            "feature_version": loaded.feature_version,
            "hidden": loaded.config.hidden,
            "vocabulary": loaded.vocabulary,
        }

    @property
    def counters(self) -> dict[str, int]:
        """asks: answered; empty: with no drafts; refused: at once, the queue being full; outdated: repeated or behind a
        newer ask, not answered; evicted: contexts that gave way to another link's; turned_away: new ones without a
        place; invalid: appends that cannot be; shared_rows: copied from other contexts; unshared: shares whose source
        was gone; appended_rows: of features that became context KV; steps: forwards; drafts: their blocks; rows: of
        those, bonus tokens included. On the kernels also padding_rows: computed beside them to fill a bucket;
        eager_steps: forwards that no CUDA graph held; graphs, graph_failures: sizes with and without one."""
        return {**self._counters, **self._inbox.counters, **self._drafter.counters}

    def load(self) -> Heartbeat:
        """Since the last call: share of time spent in passes; median seconds of the last passes that drafted. totals:
        since the start."""
        now = time.monotonic()
        elapsed, busy = now - self._measured, self._busy
        self._measured, self._busy = now, 0.0
        seconds = self._seconds.copy()
        median = statistics.median(seconds) if seconds else 0.0
        counted = {name: value for name, value in self.counters.items() if name in DraftTotals.__struct_fields__}
        totals = DraftTotals(**counted, busy_seconds=self._busy_seconds)
        return Heartbeat(self._inbox.asks, min(1.0, busy / elapsed) if elapsed > 0 else 0.0, median, totals)

    def stop(self) -> None:
        """End the thread. Queued asks stay unanswered: their links are closed by now, or about to be."""
        self._inbox.shut()
        if self._thread is not None:
            self._thread.join(STOP_S)

    @torch.inference_mode()
    def run_once(self) -> bool:
        """One pass over what is queued; False if that was nothing. By one thread at a time."""
        events = self._inbox.take()
        if not events:
            return False
        began = time.monotonic()
        answers = Answers()
        asked = self._apply(events, answers)
        self._drafter.pool.flush()
        self._acknowledge()
        if asked:
            self._draft(asked, answers)
            self._seconds.append(time.monotonic() - began)
        self._send(answers)
        seconds = time.monotonic() - began
        self._busy += seconds
        self._busy_seconds += seconds
        return True

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._inbox.wait():
                self.run_once()
        except Exception as error:
            log.exception("the drafter's engine failed; it drafts no more")
            self._inbox.shut()
            if self._on_failure is not None:
                self._on_failure(error)

    def _apply(self, events: Sequence[Event], answers: Answers) -> dict[Key, Asked]:
        """Stage the appends, free what is closed; the newest ask of each context that is still there."""
        asked: dict[Key, Asked] = {}
        for event in events:
            link_id = event.peer.link_id
            match event:
                case Appended(context_id=context_id, start=start, features=features):
                    self._append((link_id, context_id), start, features)
                case Shared(share=share):
                    self._share((link_id, share.context_id), share)
                case Asked(peer=peer, ask=ask):
                    earlier = asked.pop((link_id, ask.context_id), None)
                    if earlier is not None:
                        answers.add(peer, _empty(earlier.ask))
                    asked[link_id, ask.context_id] = event
                case Closed(context_ids=context_ids):
                    for context_id in context_ids:
                        self._close((link_id, context_id))
                        asked.pop((link_id, context_id), None)
                case Dropped(context_id=context_id):
                    self._free((link_id, context_id))
                    self._tell_evicted((link_id, context_id))
                case Linked(peer=peer):
                    self._peers[link_id] = peer
                case Lost():
                    self._peers.pop(link_id, None)
                    for key in [*self._table.keys(), *asked]:
                        if key[0] == link_id:
                            self._free(key)
                            asked.pop(key, None)
        return asked

    def _append(self, key: Key, start: int, features: torch.Tensor) -> None:
        fits = features.ndim == 2 and features.shape[1] == self._loaded.config.hidden
        if not fits or key[0] not in self._peers or not 0 <= start < MAX_POSITION - len(features):
            self._counters["invalid"] += 1
            return
        placement = self._table.append(key, start, len(features))
        if placement is None:
            self._turned_away[key] = None
            return
        self._note_evicted(placement.evicted)
        self._drafter.pool.stage(placement, features)
        self._counters["appended_rows"] += len(placement.rows)
        self._moved[key] = placement.context

    def _share(self, key: Key, share: Share) -> None:
        copied = self._table.share(key, (key[0], share.source), share.start, share.count)
        peer = self._peers.get(key[0])
        if copied is None:
            self._counters["unshared"] += 1
            if peer is not None:
                peer.unshared(key[1])
            return
        self._note_evicted(copied.evicted)
        pool = self._drafter.pool
        to, of = pool.first_row(copied.context), pool.first_row(copied.source)
        pool.copy([to + row for row in copied.rows], [of + row for row in copied.sources], copied.first)
        self._counters["shared_rows"] += len(copied.rows)
        self._moved[key] = copied.context

    def _note_evicted(self, key: Key | None) -> None:
        if key is not None:
            self._moved.pop(key, None)
            self._tell_evicted(key)

    def _close(self, key: Key) -> None:
        self._table.close(key)
        self._moved.pop(key, None)

    def _free(self, key: Key) -> None:
        self._table.free(key)
        self._moved.pop(key, None)

    def _acknowledge(self) -> None:
        marks: dict[str, list[Mark]] = {}
        for (link_id, context_id), context in self._moved.items():
            marks.setdefault(link_id, []).append(Mark(context_id, context.watermark))
        self._moved.clear()
        for link_id, of_link in marks.items():
            for first in range(0, len(of_link), MAX_ENTRIES):
                self._peers[link_id].ack(of_link[first : first + MAX_ENTRIES])
        for key in self._turned_away:
            self._counters["turned_away"] += 1
            if (peer := self._peers.get(key[0])) is not None:
                peer.evicted(key[1])
        self._turned_away.clear()

    def _tell_evicted(self, key: Key) -> None:
        self._counters["evicted"] += 1
        peer = self._peers.get(key[0])
        if peer is not None:
            peer.evicted(key[1])

    def _draft(self, asked: dict[Key, Asked], answers: Answers) -> None:
        """Draft what is ready, in one forward; the rest is answered empty."""
        ready: list[Asked] = []
        blocks: list[Block] = []
        for key, event in asked.items():
            block = self._block(key, event.ask)
            if block is None:
                answers.add(event.peer, _empty(event.ask))
            else:
                ready.append(event)
                blocks.append(block)
        if not ready:
            return
        self._counters["steps"] += 1
        self._counters["drafts"] += len(blocks)
        drafts = self._drafter.draft(blocks, [event.ask.bonus_token for event in ready])
        for event, (token_ids, confidence) in zip(ready, drafts):
            answers.add(event.peer, _answer(event.ask, token_ids, confidence))

    def _block(self, key: Key, ask: DraftAsk) -> Block | None:
        """Where an ask is to be drafted; None if it cannot be: features missing, or values out of their range."""
        context = self._table.get(key)
        if context is None or not 1 <= ask.rows < self._loaded.config.block_size:
            return None
        held = self._table.held(context)
        if not 0 <= ask.bonus_token < self._loaded.vocabulary or not 0 <= context.watermark - ask.base < held:
            return None
        stale = ask.base < context.watermark
        return Block(self._drafter.pool.first_row(context), held, ask.base, ask.rows + 1, stale)

    def _send(self, answers: Answers) -> None:
        self._counters["asks"] += answers.count
        self._counters["empty"] += answers.empty
        for peer, of_peer in answers.by_peer():
            for first in range(0, len(of_peer), MAX_ENTRIES):
                peer.answer(of_peer[first : first + MAX_ENTRIES])


def block_drafter(loaded: LoadedDrafter, slots: int, blocks: int | None = None, graphs: bool = True) -> BlockDrafting:
    """On the kernels if the drafter was loaded for them. blocks, graphs: see KernelDrafter."""
    if loaded.head_weight is None:
        return BlockDrafter(loaded, slots)
    from drafter_service.kernel_blocks import KernelDrafter  # imports triton

    return KernelDrafter(loaded, slots, blocks, graphs)


def _contexts(loaded: LoadedDrafter, settings: DrafterSettings) -> int:
    """How many contexts to hold; on a GPU no more than it has room for, and a table of its memory in the log."""
    model = loaded.model
    if model.device.type != "cuda":
        return ON_CPU if settings.max_contexts == "auto" else settings.max_contexts
    make = partial(block_drafter, loaded, graphs=False)
    memory, step = measured_memory(loaded, make, CudaMeter(model.device), settings.memory_share, settings.max_queue)
    size = ContextSize(loaded.window, loaded.config.block_size, model.row_bytes)
    count, table = chosen_contexts(settings.max_contexts, size, memory, step)
    log.info("memory of the drafter\n%s", table)
    return count


class Answers:
    """Answers of one pass, by link."""

    def __init__(self) -> None:
        self.count = self.empty = 0
        self._of: dict[str, tuple[Peer, list[DraftAnswer]]] = {}

    def add(self, peer: Peer, answer: DraftAnswer) -> None:
        self.count += 1
        self.empty += not answer.token_ids
        self._of.setdefault(peer.link_id, (peer, []))[1].append(answer)

    def by_peer(self) -> Collection[tuple[Peer, list[DraftAnswer]]]:
        return self._of.values()


def _empty(ask: DraftAsk) -> DraftAnswer:
    return DraftAnswer(ask.context_id, ask.base, (), ())


def _answer(ask: DraftAsk, token_ids: Sequence[int], confidence: Sequence[float]) -> DraftAnswer:
    if not math.isfinite(sum(confidence)):  # overflow in half precision: such tokens are worth nothing
        return _empty(ask)
    return DraftAnswer(ask.context_id, ask.base, tuple(token_ids), tuple(confidence))
