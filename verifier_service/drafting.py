"""The engine's proposer behind a guard: drafting can cost speed, never a request.

What fails in a proposer ends that proposer and nothing else: the step goes on, the next ones decode plainly, and a
fresh one is built beside them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch
from msgspec.structs import asdict, replace

from cluster.contracts import Configure
from verifier_service.block_hashes import BlockHash
from verifier_service.proposers.face import Proposer, ProposerState
from verifier_service.proposers.plain import NoProposer
from verifier_service.proposers.renewal import END_S, Renewal, ended
from verifier_service.sequence import Progress, RunningRequest

log = logging.getLogger(__name__)


class Drafting:
    """Called from the engine's thread, except for configure, set_drafters and state.

    make_proposer: builds the successor of a proposer that failed, on another thread. set_taps: told the tap layers of
    whichever proposer is in use.
    """

    def __init__(
        self, proposer: Proposer, make_proposer: Callable[[], Proposer], set_taps: Callable[[Sequence[int]], None]
    ):
        self._proposer = proposer
        self._renewal = Renewal(make_proposer)
        self._set_taps = set_taps
        self._failures = 0
        self._known = threading.Lock()  # what a successor has to be told as well
        self._settings = Configure()
        self._drafters: tuple[str, ...] = ()
        set_taps(proposer.tap_layers)

    def refresh(self) -> None:
        """Between two steps: a successor that has been built takes over."""
        if (fresh := self._renewal.take()) is not None:
            self._guarded(lambda: self._use(fresh))

    def resting(self) -> bool:
        """Whether nothing is lost by planning the next step before the outcome of the one under way."""
        resting = False

        def ask() -> None:
            nonlocal resting
            resting = self._proposer.resting()

        self._guarded(ask)
        return resting and not self._renewal.ready  # a successor's tap layers are not those of a step under way

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        self._guarded(lambda: self._proposer.advance(progress, taps))

    def collect(self) -> float:
        """Seconds of the step that went into drafting."""
        spent = 0.0

        def collect() -> None:
            nonlocal spent
            spent = self._proposer.collect()

        self._guarded(collect)
        return spent

    def learn(self, progress: Sequence[Progress], prefilled: bool, seconds: float) -> None:
        self._guarded(lambda: self._proposer.learn(progress, prefilled, seconds))

    def forget(self, sequences: Sequence[RunningRequest]) -> None:
        self._guarded(lambda: self._proposer.forget(sequences))

    def evicted(self, hashes: Sequence[BlockHash]) -> None:
        self._guarded(lambda: self._proposer.evicted(hashes))

    def configure(self, settings: Configure) -> None:
        with self._known:
            given = {name: value for name, value in asdict(settings).items() if value is not None}
            self._settings = replace(self._settings, **given)
            self._proposer.configure(settings.max_draft_tokens, settings.soft_deadline_s)

    def set_drafters(self, addresses: Sequence[str]) -> None:
        with self._known:
            self._drafters = tuple(addresses)
            self._proposer.set_drafters(addresses)

    def state(self) -> ProposerState:
        """Of the proposer in use; `drafting_failures` among its counters is how many failed before it."""
        state = self._proposer.state()
        counters = {**state.counters, "drafting_failures": float(self._failures)}
        return ProposerState(state.linked, state.drafter_id, state.epoch, counters)

    def stop(self) -> None:
        """Takes at most END_S."""
        self._renewal.stop()
        ended(self._proposer).join(END_S)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("drafting failed; decoding goes on plainly until it is renewed")
            self._failures += 1
            failed = self._proposer
            self._use(NoProposer())
            self._renewal.begin(failed)

    def _use(self, proposer: Proposer) -> None:
        with self._known:
            self._proposer = proposer
            proposer.configure(self._settings.max_draft_tokens, self._settings.soft_deadline_s)
            proposer.set_drafters(self._drafters)
        self._set_taps(proposer.tap_layers)
