"""A plan as tensors: what every layer of one forward needs to know. Passed through the forward's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from verifier_service.model.kv_cache import BlockTables, KeyValueCache, LatentsCache
from verifier_service.model.recurrent_state import RecurrentStates
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

PIECE = 256  # query rows of one attention call, at most: with SCORES, bounds its memory in a long prefill
SCORES = 1 << 21  # of a head in one attention call, at most, but for LEAST_PIECE rows
LEAST_PIECE = 16
KEPT_MASK = 1 << 20  # entries; a larger mask is made anew for every layer, which costs less than holding a step's


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens first..stop of the step that attend to tokens skip..context of `blocks`, their own included.

    blocks: a slot's first ones, or in a sliding window those that any of the rows still sees, with skip as the oldest
    token seen.
    """

    first: int
    stop: int
    context: int
    blocks: torch.Tensor
    mask: Callable[[], torch.Tensor] | None
    skip: int = 0

    @property
    def bias(self) -> torch.Tensor | None:
        """float [rows, context - skip], 0 or -inf; None for a single row, which sees them all."""
        return None if self.mask is None else self.mask()


@dataclass(frozen=True)
class VerifyWindow:
    """The verify rows for the recurrent layers. tokens: how many, at the front of the step; longest: of one row.

    gather [rows x longest]: flat token of each padded cell; scatter [tokens]: the cell of each flat token;
    both None if all rows have the same length.
    """

    rows: int
    tokens: int
    longest: int
    slots: torch.Tensor
    gather: torch.Tensor | None
    scatter: torch.Tensor | None


@dataclass(frozen=True)
class PrefillPart:
    """Tokens first..stop of the step are a chunk of `slot`'s prompt, its tokens from `start` on.

    checkpoint: where its last state is saved as well; -1: nowhere.
    """

    first: int
    stop: int
    slot: int
    start: int
    checkpoint: int

    @property
    def fresh(self) -> bool:
        """From a zero state."""
        return self.start == 0

    @property
    def context(self) -> int:
        """Tokens that its last one sees."""
        return self.start + self.stop - self.first


@dataclass(frozen=True)
class Step:
    """Everything that the layers of one forward share."""

    token_ids: torch.Tensor  # [tokens]
    positions: torch.Tensor  # [tokens]
    kv_rows: torch.Tensor  # [tokens]
    works: tuple[tuple[Segment, ...], ...]  # by verify row and prefill chunk
    windowed: dict[int, tuple[tuple[Segment, ...], ...]]  # for the layers with a sliding window of so many tokens
    verify: VerifyWindow | None
    prefill: tuple[PrefillPart, ...]
    longest_context: int
    logit_rows: torch.Tensor | None  # [rows wanted]; None: exactly the verify tokens
    caches: dict[int, KeyValueCache]  # of the layers that attend to keys and values
    latents: dict[int, LatentsCache]  # of the layers that attend to latents
    states: RecurrentStates | None


class StepBuilder:
    """Turns plans into steps over one rank's caches."""

    def __init__(
        self,
        tables: BlockTables,
        caches: dict[int, KeyValueCache],
        latents: dict[int, LatentsCache],
        states: RecurrentStates | None,
        *,
        windows: Iterable[int] = (),
        max_context: int,
        dtype: torch.dtype,
        device: str | torch.device,
    ):
        self.tables, self.caches, self.latents, self.states = tables, caches, latents, states
        self.dtype, self.device = dtype, device
        self._windows = tuple(windows)
        self._counting = torch.arange(max_context, device=device)

    def build(self, plan: StepPlan) -> Step:
        """The plan must hold at least one token, and its slots must own the blocks that it needs."""
        tokens: list[int] = []
        positions: list[int] = []
        kv_rows: list[np.ndarray] = []
        works: list[tuple[Segment, ...]] = []
        prefill: list[PrefillPart] = []
        wanted: list[int] = []
        longest = 0
        everything: list[VerifyRow | PrefillChunk] = [*plan.verify, *plan.prefill]
        for work in everything:
            first, stop = len(tokens), work.start + len(work.token_ids)
            blocks = self.tables.of(work.slot, stop)
            at = np.arange(work.start, stop)
            size = self.tables.block_tokens
            kv_rows.append(blocks[at // size] * size + at % size)
            tokens.extend(work.token_ids)
            positions.extend(range(work.start, stop))
            works.append(tuple(self._segments(work, first, self._tensor(blocks))))
            longest = max(longest, stop)
            if isinstance(work, PrefillChunk):
                prefill.append(PrefillPart(first, len(tokens), work.slot, work.start, work.checkpoint))
                if work.completes_prompt:
                    wanted.append(len(tokens) - 1)
        verified = sum(len(row.token_ids) for row in plan.verify)
        return Step(
            token_ids=self._indices(tokens),
            positions=self._indices(positions),
            kv_rows=self._tensor(kv_rows[0] if len(kv_rows) == 1 else np.concatenate(kv_rows)),
            works=tuple(works),
            windowed={
                window: tuple((self._narrowed(s, window),) for work in works for s in work) for window in self._windows
            },
            verify=self._window(plan.verify, verified) if plan.verify else None,
            prefill=tuple(prefill),
            longest_context=longest,
            logit_rows=self._indices([*range(verified), *wanted]) if plan.prefill else None,
            caches=self.caches,
            latents=self.latents,
            states=self.states,
        )

    def _segments(self, work: VerifyRow | PrefillChunk, first: int, blocks: torch.Tensor) -> list[Segment]:
        count, size = len(work.token_ids), self.tables.block_tokens
        segments = []
        piece = max(LEAST_PIECE, min(PIECE, SCORES // (work.start + count)))
        for begin in range(0, count, piece):
            end = min(begin + piece, count)
            context = work.start + end
            segments.append(
                Segment(
                    first=first + begin,
                    stop=first + end,
                    context=context,
                    blocks=blocks[: -(-context // size)],
                    mask=None if end - begin == 1 else self._mask(work.start + begin, context),
                )
            )
        return segments

    def _narrowed(self, whole: Segment, window: int) -> Segment:
        """Of a segment over a slot's whole context, what its rows see of it through a sliding window."""
        rows = whole.stop - whole.first
        if whole.context <= window:
            return whole
        oldest = max(0, whole.context - rows - window + 1)  # seen by the first row; the others see less of the past
        unseen, size = oldest // self.tables.block_tokens, self.tables.block_tokens
        return Segment(
            first=whole.first,
            stop=whole.stop,
            context=whole.context - unseen * size,
            blocks=whole.blocks[unseen:],
            mask=None if rows == 1 else self._mask(whole.context - rows, whole.context, oldest, window),
            skip=oldest - unseen * size,
        )

    def _mask(self, start: int, context: int, oldest: int = 0, window: int | None = None) -> Callable[[], torch.Tensor]:
        make = partial(self._causal, start, context, oldest, window)
        if (context - start) * (context - oldest) > KEPT_MASK:
            return make
        made = make()
        return lambda: made

    def _causal(self, start: int, context: int, oldest: int, window: int | None) -> torch.Tensor:
        """Of rows start..context over tokens oldest..context."""
        token, row = self._counting[oldest:context], self._counting[start:context, None]
        hidden = token > row
        if window is not None:
            hidden |= token <= row - window
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))

    def _window(self, rows: tuple[VerifyRow, ...], tokens: int) -> VerifyWindow:
        lengths = [len(row.token_ids) for row in rows]
        longest = max(lengths)
        gather = scatter = None
        if min(lengths) != longest:
            cells = np.arange(longest)
            starts = np.cumsum([0, *lengths[:-1]])
            inside = cells < np.array(lengths)[:, None]
            own = starts[:, None]  # padding is the row's own first token: another request's could bring its NaN in
            gather = self._tensor(np.where(inside, own + cells, own).reshape(-1))
            scatter = self._tensor(np.flatnonzero(inside))
        slots = self._indices([row.slot for row in rows])
        return VerifyWindow(len(rows), tokens, longest, slots, gather, scatter)

    def _indices(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
