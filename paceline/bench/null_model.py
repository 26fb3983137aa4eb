"""A target and a drafter without a model, so that a run of the engine shows what its host side costs.

The text counts up modulo the vocabulary. The drafter's first `right` drafts of every block are right, the next is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.link.face import LinkState, Peer
from cluster.link.messages import Draft, DraftAnswer, DraftAsk, Heartbeat, Hello, Piece, Share, Welcome
from verifier_service.model.face import ForwardOutput, ModelShape
from verifier_service.plan import StepPlan

VOCABULARY = 64
HIDDEN = 16
WINDOW = 4096


class NullRunner:
    """A Runner whose forward is one look-up."""

    def __init__(self, max_context: int):
        self.shape = ModelShape(VOCABULARY, HIDDEN, max_context, 1)
        self._logits = torch.eye(VOCABULARY).roll(1, dims=1)
        self._features = torch.zeros(1 << 16, HIDDEN)
        self._taps = False
        self._taken = torch.empty(0, dtype=torch.long)

    def feed(self, tokens: torch.Tensor) -> None:
        self._taken = tokens

    def counters(self) -> dict[str, float]:
        return {}

    def set_taps(self, layer_ids: Sequence[int]) -> None:
        self._taps = bool(layer_ids)

    def forward(self, plan: StepPlan) -> ForwardOutput:
        rows = [token for row in plan.verify for token in row.token_ids]
        tokens = len(rows) + sum(len(chunk.token_ids) for chunk in plan.prefill)
        rows += [chunk.token_ids[-1] for chunk in plan.prefill if chunk.completes_prompt]
        ids = torch.tensor(rows, dtype=torch.long)
        if plan.ahead:
            ids = torch.where(ids < 0, self._taken[(-1 - ids).clamp(min=0)], ids)
        logits = self._logits.index_select(0, ids)
        return ForwardOutput(logits, self._features[:tokens] if self._taps else None)


class NullFuser:
    """Features are the taps."""

    target_layer_ids = (0,)

    def __init__(self, block_size: int):
        self.block_size = block_size

    def __call__(self, taps: torch.Tensor) -> torch.Tensor:
        return taps


class NullDrafts:
    """Whatever is asked for, from a table."""

    def __init__(self, block_size: int, right: int):
        self.block_size = block_size
        self._ids = [  # by bonus token
            tuple((token + 1 + i + (i >= right)) % VOCABULARY for i in range(block_size - 1))
            for token in range(VOCABULARY)
        ]
        self._confidence = (0.5,) * (block_size - 1)

    def answers(self, asks: Sequence[DraftAsk]) -> list[DraftAnswer]:
        ids, confidence = self._ids, self._confidence
        return [
            DraftAnswer(ask.context_id, ask.base, ids[ask.bonus_token][: ask.rows], confidence[: ask.rows])
            for ask in asks
        ]


class NullLink:
    """A VerifierLink that answers at once. Nothing is sent, nothing is lost."""

    queued_bytes = 0
    drafter_load = Heartbeat()

    def __init__(self, drafts: NullDrafts):
        self._drafts = drafts
        self.state = LinkState(True, epoch=1, drafter_id="null", block_size=drafts.block_size, window=WINDOW)

    def append(self, pieces: Sequence[Piece], features: torch.Tensor) -> None:
        return

    def share(self, share: Share) -> None:
        return

    def unshared(self) -> list[str]:
        return []

    def ask(self, asks: Sequence[DraftAsk]) -> None:
        return

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        return self._drafts.answers(asks)

    def close_contexts(self, context_ids: Sequence[str]) -> None:
        return

    def evicted(self) -> list[str]:
        return []

    def set_drafters(self, addresses: Sequence[str]) -> None:
        return

    def stop(self) -> None:
        return


class NullDrafter:
    """A DrafterHandler behind a real link: takes whatever comes, and answers at once on the thread that reads."""

    def __init__(self, drafts: NullDrafts):
        self._drafts = drafts

    def hello(self, hello: Hello) -> Welcome:
        return Welcome("null", "", self._drafts.block_size, capacity_contexts=1 << 14, window=WINDOW)

    def linked(self, peer: Peer) -> None:
        return

    def append(self, peer: Peer, context_id: str, start: int, features: torch.Tensor) -> None:
        return

    def share(self, peer: Peer, share: Share) -> None:
        return

    def draft(self, peer: Peer, draft: Draft) -> None:
        peer.answer(self._drafts.answers(draft.asks))

    def close_contexts(self, peer: Peer, context_ids: Sequence[str]) -> None:
        return

    def lost(self, peer: Peer) -> None:
        return
