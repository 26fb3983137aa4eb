"""A Runner without a model: logits are a hash of the token history, read back through the KV blocks it was stored in.

A plan that mixes up slots, blocks, positions, roll-back or recurrent commits gives other tokens, or raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from verifier_service.model.face import ForwardOutput, ModelShape
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow
from verifier_service.sampling.draw import Draw
from verifier_service.sampling.sampler import decide

ORDER = 6  # logits depend on so many last tokens, and on the position
TABLE = 4096


class FakeRunner:
    """vocabulary small; taps are [position, token] pairs so that tests can tell whose they are.

    checkpoints: None = no recurrent state. Otherwise a slot's state is the list of tokens that it has seen.
    draws: takes the tokens of a plan with draws itself, and says something else for late rows.
    """

    def __init__(
        self,
        slots: int,
        blocks: int,
        block_tokens: int,
        vocabulary: int = 64,
        max_context: int = 4096,
        checkpoints: int | None = None,
        draws: bool = False,
    ):
        self.shape = ModelShape(vocabulary, 2, max_context, 1, checkpoints, draws=draws)
        self.plans: list[StepPlan] = []
        self._block_tokens = block_tokens
        self._kv = [[-1] * block_tokens for _ in range(blocks)]
        self._tables: list[list[int]] = [[] for _ in range(slots)]
        self._recurrent = checkpoints is not None
        self._states: list[list[int]] = [[] for _ in range(slots)]
        self._checkpoints: list[list[int]] = [[] for _ in range(checkpoints or 0)]
        self._verified: dict[int, Sequence[int]] = {}
        self._logits = table(vocabulary)
        self._taps = False
        self._fed: list[int] = []

    def set_taps(self, layer_ids: Sequence[int]) -> None:
        self._taps = bool(layer_ids)

    def counters(self) -> dict[str, float]:
        return {}

    def feed(self, tokens: torch.Tensor) -> None:
        self._fed = tokens.tolist()
        assert min(self._fed, default=0) >= 0

    def forward(self, plan: StepPlan) -> ForwardOutput:
        self.plans.append(plan)
        self._apply(plan)
        plan = self._resolved(plan)
        rows: list[int] = []
        taps: list[tuple[int, int]] = []
        everything: list[VerifyRow | PrefillChunk] = [*plan.verify, *plan.prefill]
        for work in everything:
            if self._recurrent:
                self._check_state(work)
            keys = self._write(work.slot, work.start, work.token_ids)
            rows += keys if isinstance(work, VerifyRow) else keys[-1:] if work.completes_prompt else []
            taps += [(work.start + i, token) for i, token in enumerate(work.token_ids)]
            if isinstance(work, VerifyRow):
                self._verified[work.slot] = work.token_ids
            elif self._recurrent:
                self._states[work.slot] = self._states[work.slot][: work.start] + list(work.token_ids)
                if work.checkpoint >= 0:
                    self._checkpoints[work.checkpoint] = self._states[work.slot]
        logits = self._logits[torch.tensor(rows, dtype=torch.long)]
        known = torch.tensor(taps, dtype=torch.float32) if self._taps and taps else None
        return ForwardOutput(logits, known) if plan.draws is None else self._taken(plan, logits, known)

    def _taken(self, plan: StepPlan, logits: torch.Tensor, taps: torch.Tensor | None) -> ForwardOutput:
        assert self.shape.draws, "nobody asked for this"
        draws = [Draw(d.row, d.count, d.position, d.seed, d.choice, d.params) for d in plan.draws or ()]
        tokens = decide(logits, draws)
        late = [row for each in plan.shown if each.late for row in each.rows]
        assert not {row for draw in draws for row in range(draw.row, draw.row + draw.count)}.intersection(late)
        tokens[late] = (tokens[late] + 1) % self.shape.vocabulary
        self._fed = [] if late else tokens.clamp(min=0).tolist()
        shown = [row for each in plan.shown for row in each.rows]
        return ForwardOutput(logits[shown] if shown else None, taps, tokens)

    def _resolved(self, plan: StepPlan) -> StepPlan:
        """With the tokens themselves where the plan names rows of the step before."""
        rows = [row for row in plan.verify if row.token_ids[0] < 0]
        assert not rows or plan.ahead
        assert len({row.token_ids[0] for row in rows}) == len(rows), "two requests follow one row"
        verify = tuple(
            VerifyRow(row.slot, row.start, tuple(t if t >= 0 else self._fed[-1 - t] for t in row.token_ids))
            for row in plan.verify
        )
        return replace(plan, verify=verify)

    def _apply(self, plan: StepPlan) -> None:
        assert {slot for slot, _ in plan.decided} == set(self._verified), "every verify row is decided in the next plan"
        assert len({checkpoint for _, _, checkpoint in plan.saved}) == len(plan.saved), "one is written twice"
        before = {slot: self._states[slot] for slot in self._verified}
        for slot, kept in plan.decided:
            assert 1 <= kept <= len(self._verified[slot])
            self._states[slot] = [*self._states[slot], *self._verified[slot][:kept]]
        for slot, kept, checkpoint in plan.saved:
            state = [*before[slot], *self._verified[slot][:kept]] if kept else self._states[slot]
            assert state == self._states[slot][: len(state)]
            self._checkpoints[checkpoint] = state
        self._verified.clear()
        for slot in plan.released:
            self._tables[slot], self._states[slot] = [], []
        for slot, block in plan.new_blocks:
            self._tables[slot].append(block)
        for slot, checkpoint in plan.restored:
            self._states[slot] = self._checkpoints[checkpoint]

    def _check_state(self, work: VerifyRow | PrefillChunk) -> None:
        """A state is of exactly the tokens before the work, all of which are in its blocks."""
        state = self._states[work.slot] if work.start else []
        assert len(state) == work.start, (work, state)
        blocks = self._tables[work.slot]
        assert state == [self._kv[blocks[p // self._block_tokens]][p % self._block_tokens] for p in range(work.start)]

    def _write(self, slot: int, start: int, token_ids: Sequence[int]) -> list[int]:
        keys = []
        for position, token in enumerate(token_ids, start):
            block = self._tables[slot][position // self._block_tokens]
            assert sum(block in table for table in self._tables) == 1, f"shared block {block} is written to"
            self._kv[block][position % self._block_tokens] = token
            keys.append(history_key(self._read(slot, position), position))
        return keys

    def _read(self, slot: int, position: int) -> list[int]:
        size, blocks = self._block_tokens, self._tables[slot]
        return [self._kv[blocks[p // size]][p % size] for p in range(max(0, position - ORDER + 1), position + 1)]


class Broken(FakeRunner):
    """Fails in its third step."""

    def forward(self, plan: StepPlan) -> ForwardOutput:
        if plan.step == 3:
            raise RuntimeError("a rank is gone")
        return super().forward(plan)


def table(vocabulary: int) -> torch.Tensor:
    """float32 [TABLE, vocabulary]: the logits of each history key."""
    return torch.randn(TABLE, vocabulary, generator=torch.Generator().manual_seed(3)) * 3


def history_key(last: Sequence[int], position: int) -> int:
    """Of the last ORDER tokens up to `position`."""
    key = position
    for token in last:
        key = (key * 1000003 + token + 1) & 0xFFFFFFFF
    return (key ^ key >> 13) % TABLE


class FakeModel:
    """The text that a FakeRunner's model gives, one token at a time."""

    def __init__(self, vocabulary: int = 64):
        self._best = table(vocabulary).argmax(-1).tolist()

    def next(self, tokens: Sequence[int]) -> int:
        return self._best[history_key(tokens[-ORDER:], len(tokens) - 1)]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.next(tokens))
        return tokens[len(prompt) :]
