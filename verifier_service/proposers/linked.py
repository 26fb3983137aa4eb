"""Drafts from a DFlash drafter at the other end of a link: context features go there, draft tokens come back."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from msgspec.structs import asdict

from cluster.link.face import LinkState, VerifierLink
from cluster.link.messages import DraftAnswer, DraftAsk
from verifier_service.acceptance import still_to_come
from verifier_service.block_hashes import BlockHash
from verifier_service.control import SpeculationControl
from verifier_service.features import FeatureStore
from verifier_service.proposers.context import Context
from verifier_service.proposers.contexts import Contexts, Fuser
from verifier_service.proposers.face import ProposerState
from verifier_service.proposers.patience import Patience
from verifier_service.sequence import Progress, RunningRequest

log = logging.getLogger(__name__)

LEARNED_ROWS = 16  # of a step, about: more would say little more, and take time


class LinkProposer:
    """A Proposer over a VerifierLink. Whatever the drafter does or fails to do costs speed only.

    window: features kept per request while no drafter has named its own. max_draft_tokens: None = block size - 1.
    control: chooses when to ask, for whom, and how many drafts to verify; None = always all.
    clock: seconds, never back.
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
        clock: Callable[[], float] = time.monotonic,
    ):
        self._link, self._fuser, self._store = link, fuser, store
        self._max_draft_tokens = max_draft_tokens
        self._patience = Patience(soft_deadline_s)
        self._control = control
        self._clock = clock
        self._epoch = 0
        self._drafter: tuple[str, str] | None = None  # and its version
        self._contexts = Contexts(link, fuser, store, verifier_id, window, clock)
        self._late: set[Context] = set()
        self._asks: list[DraftAsk] = []
        self._resting = False  # plain decoding was the better choice, last time there was one
        self._requests = 0  # of the latest step, those that go on
        self._verified = 0  # the same, of the step before: its drafts were verified in the latest
        self._asking_s = 0.0
        self._seen = 0  # rows, of which every so many are learned from
        self._counters: Counter[str] = Counter(draft_asks=0, draft_answers=0, drafts_late=0, drafts_missed=0)

    @property
    def tap_layers(self) -> tuple[int, ...]:
        return tuple(self._fuser.target_layer_ids)

    def resting(self) -> bool:
        state = self._link.state
        if not state.linked or self._max_draft_tokens == 0 or self._contexts.placeless:
            return True
        if self._stalled or not self._patience.may_ask(self._clock()):
            return True
        return self._control is not None and self._control.rests(self._requests)

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        state = self._link.state
        self._follow(state)
        owners = self._contexts.of(progress)
        self._verified, self._requests = self._requests, len([p for p in progress if p.finish is None])
        self._learn_rows(owners, progress)
        ready = [owner for owner, p in zip(owners, progress) if owner is not None and p.token_ids]
        most, chosen = self._choice(state, ready)
        if taps is not None:
            self._contexts.take(owners, progress, taps, state.linked and not self._resting)
        if not state.linked or self._resting:  # features go to the store only
            return
        began = self._clock()
        self._contexts.catch_up(None if chosen is ready else chosen)
        self._ask(chosen, most)
        self._asking_s = self._clock() - began

    def collect(self) -> float:
        if self._late:
            self._hand_out([context.asked for context in self._late if context.asked is not None], 0.0)
        asking, self._asking_s = self._asking_s, 0.0
        if not self._asks:
            return asking
        asks, self._asks = self._asks, []
        began = self._clock()
        deadline_s = self._deadline_s()
        answered = self._hand_out(asks, deadline_s)
        now = self._clock()
        waited = asking + now - began
        in_time = answered == len(asks)
        if in_time:
            self._patience.kept()
        else:
            self._missed(asks, len(asks) - answered, now, deadline_s)
        if self._control is not None:
            self._control.waited(self._requests, len(asks), waited, len(asks) - answered)
        return waited

    def learn(self, progress: Sequence[Progress], prefilled: bool, seconds: float) -> None:
        control = self._control
        if control is None:
            return
        if progress:
            drafted, matched = sum(p.drafted for p in progress), sum(p.matched for p in progress)
            control.step(self._verified or len(progress), drafted, matched, seconds, prefilled)

    def forget(self, sequences: Sequence[RunningRequest]) -> None:
        self._late.difference_update(self._contexts.forget(sequences))

    def evicted(self, hashes: Sequence[BlockHash]) -> None:
        self._store.pages.forget_names(hashes)

    def configure(self, max_draft_tokens: int | None, soft_deadline_s: float | None) -> None:
        if max_draft_tokens is not None:
            self._max_draft_tokens = max_draft_tokens
        if soft_deadline_s is not None:
            self._patience.soft_deadline_s = soft_deadline_s

    def set_drafters(self, addresses: Sequence[str]) -> None:
        self._link.set_drafters(addresses)

    def state(self) -> ProposerState:
        state = self._link.state
        counters = {
            **self._counters,
            "context_tokens": float(self._contexts.tokens_sent),
            "context_tokens_shared": float(self._contexts.tokens_shared),
            "link_bytes": float(state.sent_bytes),
            "feature_bytes": float(self._store.bytes),
            "block_feature_bytes": float(self._store.block_bytes),
        }
        if (totals := self._link.drafter_load.totals) is not None:
            counters |= {f"drafter_{name}": float(value) for name, value in asdict(totals).items()}
        return ProposerState(state.linked, state.drafter_id, state.epoch, counters)

    def stop(self) -> None:
        self._link.stop()

    def _follow(self, state: LinkState) -> None:
        """After a new epoch, or an eviction, nothing that was sent before is there."""
        if state.epoch != self._epoch:
            self._epoch = state.epoch
            drafter = state.drafter_id, state.drafter_version
            if drafter != self._drafter:
                self._drafter = drafter
                self._patience.renew()
                if self._control is not None:
                    self._control.renew()
            self._contexts.new_epoch(state)
            self._late.clear()
        for context_id in self._link.evicted():
            if (lost := self._contexts.named(context_id)) is not None:
                self._contexts.turned_away(lost)
                self._late.discard(lost)
        for context_id in self._link.unshared():
            if (lost := self._contexts.named(context_id)) is not None:
                self._contexts.unshared(lost)

    def _learn_rows(self, owners: Sequence[Context | None], progress: Sequence[Progress]) -> None:
        """What became of the drafts: of some requests in each step, where there are many."""
        if self._control is None:
            return
        stride = 1 + len(progress) // (LEARNED_ROWS + 1)
        self._seen += 1
        for index in range(self._seen % stride, len(progress), stride):
            owner, p = owners[index], progress[index]
            if p.drafted and owner is not None:
                self._control.verified(owner.trust, owner.confidence, p.drafted, p.matched)

    def _choice(self, state: LinkState, ready: list[Context]) -> tuple[int, list[Context]]:
        """How many drafts to ask of whom now; 0 = none. Decides whether to rest, if there is something to decide."""
        if not state.linked:
            return 0, []
        most = state.block_size - 1
        if self._max_draft_tokens is not None:
            most = min(most, self._max_draft_tokens)
        chosen = ready
        if most > 0:
            if self._stalled:
                self._resting = True
                return 0, []
            if not ready or not self._patience.may_ask(self._clock()):
                return 0, []
            if (control := self._control) is not None:
                willing = [context for context in ready if control.trusts(context.trust)]
                most = min(most, control.choose(self._requests, len(willing)))
                if not control.probing:
                    chosen = willing
                if len(chosen) > control.ask_at_most:  # those of whom the drafter lacks least
                    placed = (context for context in chosen if context.placed)
                    chosen = sorted(placed, key=lambda context: context.missing)[: control.ask_at_most]
        self._resting = most == 0
        return most, chosen

    @property
    def _stalled(self) -> bool:
        """Whether nothing can be asked before something is answered."""
        return bool(self._late) and len(self._late) >= self._requests

    def _deadline_s(self) -> float:
        soft = self._patience.soft_deadline_s
        return soft if self._control is None else min(soft, self._control.longest_wait(self._requests))

    def _ask(self, contexts: list[Context], most: int) -> None:
        if not most:
            return
        for context in contexts:
            sequence = context.sequence
            base = sequence.computed
            if context.sent == base and context.placed and context.asked is None:
                rows = most if most < context.limit else context.limit
                left = sequence.longest - len(sequence.tokens) - 1
                if left < rows:
                    rows = left
                if rows > 0:
                    context.asked = DraftAsk(context.context_id, base, sequence.tokens[-1], rows)
                    self._asks.append(context.asked)
        if self._asks:
            self._counters["draft_asks"] += len(self._asks)
            self._link.ask(self._asks)

    def _missed(self, asks: list[DraftAsk], count: int, now: float, deadline_s: float) -> None:
        state = self._link.state
        if not state.linked or state.epoch != self._epoch:
            return  # these answers will never come; the next epoch starts afresh
        self._patience.missed(now, deadline_s)
        self._counters["drafts_missed"] += count
        for ask in asks:
            context = self._contexts.named(ask.context_id)
            if context is not None and context.asked is ask:
                self._late.add(context)

    def _hand_out(self, asks: list[DraftAsk], timeout_s: float) -> int:
        """The answers that have come go to their requests; how many came."""
        answers = self._link.collect(asks, timeout_s)
        contexts: list[Context] = []
        drafts: list[tuple[int, ...]] = []
        sure: list[tuple[float, ...]] = []
        taken = 0
        for answer in answers:
            context = self._contexts.named(answer.context_id)
            if context is None or context.asked is None or context.asked.base != answer.base:
                continue
            context.asked = None
            taken += 1
            if context in self._late:
                self._late.discard(context)
                self._counters["drafts_late"] += 1
            useful = _still_useful(answer, context.sequence)
            if useful or not answer.token_ids:
                contexts.append(context)
                drafts.append(useful)
                sure.append(answer.confidence[len(answer.confidence) - len(useful) :])
        self._counters["draft_answers"] += taken
        if self._control is not None:
            kept = self._control.kept([context.trust for context in contexts], sure)
            drafts = [useful[:count] for useful, count in zip(drafts, kept)]
        for context, useful, confidence in zip(contexts, drafts, sure):
            context.sequence.drafts, context.confidence = useful, confidence
        return len(answers)


def _still_useful(answer: DraftAnswer, sequence: RunningRequest) -> tuple[int, ...]:
    """What an answer says beyond the tokens committed since it was asked for; nothing if they differ from it."""
    if sequence.computed != len(sequence.tokens) - 1:
        return ()  # preempted meanwhile
    if answer.base == sequence.computed:
        return answer.token_ids
    return still_to_come(answer.token_ids, sequence.tokens[answer.base + 1 :])
