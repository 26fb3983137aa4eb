"""Drafts from a DFlash drafter at the other end of a link: context features go there, draft tokens come back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from cluster.link.face import LinkState, VerifierLink
from cluster.link.messages import DraftAnswer, DraftAsk
from verifier_service.control import SpeculationControl
from verifier_service.features import FeatureStore
from verifier_service.proposers.face import ProposerState
from verifier_service.proposers.patience import Patience
from verifier_service.sequence import Key, Progress, RunningRequest

UNSENT_BYTES = 8 << 20  # while more than this waits for the drafter, contexts that lag behind are not caught up


class Fuser(Protocol):
    """taps [n, taps x hidden of the target] -> context features [n, hidden]."""

    @property
    def target_layer_ids(self) -> tuple[int, ...]: ...

    @property
    def block_size(self) -> int: ...

    def __call__(self, taps: torch.Tensor) -> torch.Tensor: ...


@dataclass(slots=True, eq=False)
class _Context:
    """A request as the drafter knows it. sent: features below this position were sent in this epoch.

    asked: base of the ask that is not answered yet, or None.
    """

    sequence: RunningRequest
    context_id: str
    limit: int
    sent: int = 0
    asked: DraftAsk | None = None


class LinkProposer:
    """A Proposer over a VerifierLink. Whatever the drafter does or fails to do costs speed only.

    window: features kept per request while no drafter has named its own. max_draft_tokens: None = block size - 1.
    control: chooses how many drafts to ask for; None = always as many as allowed.
    """

    def __init__(
        self,
        link: VerifierLink,
        fuser: Fuser,
        store: FeatureStore,
        *,
        verifier_id: str,
        max_draft_tokens: int | None,
        soft_deadline_s: float,
        window: int = 4096,
        control: SpeculationControl | None = None,
    ):
        self._link, self._fuser, self._store = link, fuser, store
        self._verifier_id = verifier_id
        self._max_draft_tokens = max_draft_tokens
        self._patience = Patience(soft_deadline_s)
        self._window = window
        self._control = control
        self._epoch = 0
        self._contexts: dict[Key, _Context] = {}
        self._by_id: dict[str, _Context] = {}
        self._lagging: set[_Context] = set()
        self._late: set[_Context] = set()
        self._asks: list[DraftAsk] = []
        self._asking_s = 0.0
        self._counters: Counter[str] = Counter(
            draft_asks=0, draft_answers=0, drafts_late=0, drafts_missed=0, context_tokens=0
        )

    @property
    def tap_layers(self) -> tuple[int, ...]:
        return tuple(self._fuser.target_layer_ids)

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        state = self._link.state
        self._follow(state)
        contexts = self._contexts
        moved = [(contexts.get(p.sequence.key) or self._begin(p.sequence), p) for p in progress if p.finish is None]
        moved = [(context, p) for context, p in moved if context.limit > 0]
        ready = [context for context, p in moved if p.token_ids]
        most = self._most(state, len(ready))
        resting = most == 0 and bool(ready)  # plain decoding: features go to the store only
        if taps is not None and moved:
            self._take_features(moved, taps, state.linked and not resting)
        if not state.linked:
            return
        if resting:
            self._lagging.update(context for context, _ in moved)
            return
        self._catch_up()
        self._ask(ready, most)

    def collect(self) -> float:
        if self._late:
            self._take([context.asked for context in self._late if context.asked is not None], 0.0)
        if not self._asks:
            return 0.0
        asks, self._asks = self._asks, []
        began = time.monotonic()
        answered = self._take(asks, self._patience.soft_deadline_s)
        now = time.monotonic()
        if answered == len(asks):
            self._patience.kept()
        else:
            self._missed(asks, len(asks) - answered, now)
        waited = self._asking_s + now - began
        if self._control is not None:
            self._control.waited(len(asks), waited)
        return waited

    def learn(self, progress: Sequence[Progress], prefilled: bool, seconds: float) -> None:
        control = self._control
        if control is None:
            return
        for p in progress:
            if p.drafted:
                control.verified(p.drafted, p.accepted)
        if progress and not prefilled:  # every row is a verified one
            control.step(len(progress), sum(p.drafted for p in progress), seconds)

    def forget(self, sequences: Sequence[RunningRequest]) -> None:
        gone = []
        for sequence in sequences:
            self._store.forget(sequence.key)
            context = self._contexts.pop(sequence.key, None)
            if context is not None:
                del self._by_id[context.context_id]
                self._lagging.discard(context)
                self._late.discard(context)
                if context.sent:
                    gone.append(context.context_id)
        if gone:
            self._link.close_contexts(gone)

    def configure(self, max_draft_tokens: int | None, soft_deadline_s: float | None) -> None:
        if max_draft_tokens is not None:
            self._max_draft_tokens = max_draft_tokens
        if soft_deadline_s is not None:
            self._patience.soft_deadline_s = soft_deadline_s

    def set_drafters(self, addresses: Sequence[str]) -> None:
        self._link.set_drafters(addresses)

    def state(self) -> ProposerState:
        state = self._link.state
        counters = {**self._counters, "link_bytes": float(state.sent_bytes), "feature_bytes": float(self._store.bytes)}
        return ProposerState(state.linked, state.drafter_id, state.epoch, counters)

    def stop(self) -> None:
        self._link.stop()

    def _follow(self, state: LinkState) -> None:
        """After a new epoch, or an eviction, nothing that was sent before is there."""
        if state.epoch != self._epoch:
            self._epoch = state.epoch
            self._window = state.window or self._window
            self._patience.renew()
            if self._control is not None:
                self._control.renew()
            for context in self._contexts.values():
                self._restart(context)
        for context_id in self._link.evicted():
            if (lost := self._by_id.get(context_id)) is not None:
                self._restart(lost)

    def _restart(self, context: _Context) -> None:
        context.sent, context.asked = 0, None
        self._late.discard(context)
        if self._store.end(context.sequence.key):
            self._lagging.add(context)

    def _begin(self, sequence: RunningRequest) -> _Context:
        own = sequence.request.max_draft_tokens
        limit = self._fuser.block_size - 1 if own is None else min(own, self._fuser.block_size - 1)
        request_id, choice = sequence.key
        context = _Context(sequence, f"{self._verifier_id}/{request_id}/{choice}", limit)
        self._contexts[sequence.key] = self._by_id[context.context_id] = context
        return context

    # Features.

    def _take_features(self, moved: list[tuple[_Context, Progress]], taps: torch.Tensor, linked: bool) -> None:
        """Fuse the committed rows in one go, keep them, and send each context its own."""
        window = self._window
        whose: list[tuple[_Context, int]] = []  # context, position of its first row
        firsts: list[int] = []
        counts: list[int] = []
        for context, progress in moved:
            skipped = len(context.sequence.tokens) - window - progress.start
            skipped = min(skipped, progress.kept) if skipped > 0 else 0
            if skipped < progress.kept:
                whose.append((context, progress.start + skipped))
                firsts.append(progress.row + skipped)
                counts.append(progress.kept - skipped)
        if not whose:
            return
        if sum(counts) != taps.shape[0]:
            taps = taps.index_select(0, _ranges(firsts, counts).to(taps.device))
        features = self._fuser(taps)
        stored = features.cpu()  # the same tensor on a CPU
        own_rows = stored.split(counts)
        sent_rows = own_rows if stored is features else features.split(counts)
        for (context, start), count, own, sent in zip(whose, counts, own_rows, sent_rows):
            self._store.put(context.sequence.key, start, own, window)
            if linked:
                self._send_new(context, start, count, sent)

    def _send_new(self, context: _Context, start: int, count: int, rows: torch.Tensor) -> None:
        if context in self._lagging or start + count <= context.sent:
            return  # caught up below, from the store; or computed again after a preemption
        if context.sent and start > context.sent:
            self._lagging.add(context)
            return
        if start < context.sent:
            rows, start, count = rows[context.sent - start :], context.sent, start + count - context.sent
        self._append(context, start, count, rows)

    def _append(self, context: _Context, start: int, count: int, rows: torch.Tensor) -> None:
        self._link.append(context.context_id, start, rows)
        self._counters["context_tokens"] += count
        context.sent = start + count

    def _catch_up(self) -> None:
        """Send lagging contexts what the store has, as fast as the drafter takes it in."""
        while self._lagging and self._link.queued_bytes < UNSENT_BYTES:
            context = self._lagging.pop()
            start, pieces = self._store.since(context.sequence.key, context.sent)
            if pieces:
                rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
                self._append(context, start, rows.shape[0], rows)

    # Drafts.

    def _most(self, state: LinkState, requests: int) -> int:
        """Drafts to ask for each of so many requests; 0 = plain decoding is the better choice."""
        if not state.linked or not requests:
            return 0
        most = state.block_size - 1
        if self._max_draft_tokens is not None:
            most = min(most, self._max_draft_tokens)
        return most if self._control is None else min(most, self._control.choose(requests))

    def _ask(self, contexts: list[_Context], most: int) -> None:
        now = time.monotonic()
        if not contexts or not self._patience.may_ask(now):
            return
        for context in contexts:
            sequence = context.sequence
            rows = min(most, context.limit, sequence.remaining - 1)
            if rows > 0 and context.asked is None and context.sent == sequence.computed:
                context.asked = DraftAsk(context.context_id, sequence.computed, sequence.tokens[-1], rows)
                self._asks.append(context.asked)
        if self._asks:
            self._counters["draft_asks"] += len(self._asks)
            self._link.ask(self._asks)
            self._asking_s = time.monotonic() - now

    def _missed(self, asks: list[DraftAsk], count: int, now: float) -> None:
        state = self._link.state
        if not state.linked or state.epoch != self._epoch:
            return  # these answers will never come; the next epoch starts afresh
        self._patience.missed(now)
        self._counters["drafts_missed"] += count
        for ask in asks:
            context = self._by_id.get(ask.context_id)
            if context is not None and context.asked is ask:
                self._late.add(context)

    def _take(self, asks: list[DraftAsk], timeout_s: float) -> int:
        """Hand the answers that have come to their requests; how many came."""
        answers = self._link.collect(asks, timeout_s)
        for (context_id, _), answer in answers.items():
            context = self._by_id.get(context_id)
            if context is None or context.asked is None or context.asked.base != answer.base:
                continue
            context.asked = None
            self._counters["draft_answers"] += 1
            if context in self._late:
                self._late.discard(context)
                self._counters["drafts_late"] += 1
            context.sequence.drafts = _still_useful(answer, context.sequence)
        return len(answers)


def _ranges(firsts: list[int], counts: list[int]) -> torch.Tensor:
    """int64: first .. first + count - 1 of each pair, one after the other."""
    lengths = np.array(counts)
    before = lengths.cumsum() - lengths
    return torch.from_numpy(np.repeat(np.array(firsts) - before, lengths) + np.arange(int(lengths.sum())))


def _still_useful(answer: DraftAnswer, sequence: RunningRequest) -> tuple[int, ...]:
    """What an answer says beyond the tokens committed since it was asked for; nothing if they differ from it."""
    if sequence.computed != len(sequence.tokens) - 1:
        return ()  # preempted meanwhile
    since = tuple(sequence.tokens[answer.base + 1 :])
    if answer.token_ids[: len(since)] != since:
        return ()
    return answer.token_ids[len(since) :]
