"""Draft tokens from blocks: embed with the target's embedding, run the DFlash layers, read the target's head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from drafter_service.attention import AttendEach, AttendPadded, Block
from drafter_service.context import ContextTable
from drafter_service.loading import LoadedDrafter
from drafter_service.pool import ContextPool

LOGITS_AT_ONCE = 1 << 26  # elements: the head runs in chunks of rows, so that many asks do not need gigabytes

Drafts = tuple[list[int], list[float]]  # token ids, confidence of each


class BlockDrafting(ABC):
    """A loaded drafter with its context pool. Everything under `torch.inference_mode`, on one thread.

    counters: of drafting, for people; see `DrafterEngine.counters`. graphs: CUDA graphs that it has, or would have if
    it were made with them.
    """

    pool: ContextPool
    counters: Counter[str]
    graphs = 0

    @abstractmethod
    def draft(self, blocks: Sequence[Block], bonus_tokens: Sequence[int]) -> list[Drafts]:
        """Per block, its rows - 1 most probable tokens and how probable each is.

        Confidence is P(token) = exp(max logit - logsumexp) of the token's own row. A row is computed without knowing
        which tokens the rows before it will become; read as "right, if all before it in the block are right".
        DFlash 2: the tokens that the selector chooses, each with its share among its row's candidates.
        """

    @torch.inference_mode()
    def _warm_up(self, loaded: LoadedDrafter) -> None:
        """The first call of every kernel is slow; let no verifier wait for it."""
        table, rows = ContextTable(1, self.pool.window), min(8, self.pool.window)
        placement = table.append(("", "warm-up"), 0, rows)
        assert placement is not None, "an empty table has room"
        model = loaded.model
        self.pool.stage(placement, torch.zeros(rows, loaded.config.hidden, dtype=model.dtype, device=model.device))
        self.pool.flush()
        for _ in range(2):
            self.draft([Block(0, rows, rows, loaded.config.block_size, stale=False)], [0])


class BlockDrafter(BlockDrafting):
    """With torch's own operations, in as few of them as a CPU wants."""

    def __init__(self, loaded: LoadedDrafter, slots: int):
        self.counters = Counter()
        self._loaded, self._model = loaded, loaded.model
        self.pool = ContextPool(self._model, slots, loaded.window)
        self._attend = AttendEach if self._model.device.type == "cpu" else AttendPadded
        self._warm_up(loaded)
        self.counters = Counter(rows=0)

    def draft(self, blocks: Sequence[Block], bonus_tokens: Sequence[int]) -> list[Drafts]:
        loaded, device = self._loaded, self._model.device
        ids: list[int] = []
        positions: list[int] = []
        inside: list[int] = []  # places in the blocks
        asked: list[int] = []  # rows of the batch that are masks
        for block, bonus in zip(blocks, bonus_tokens):
            asked += range(len(ids) + 1, len(ids) + block.rows)
            ids += [bonus, *[loaded.config.mask_token_id] * (block.rows - 1)]
            positions += range(block.base, block.base + block.rows)
            inside += range(block.rows)
        self.counters["rows"] += len(ids)
        tokens, where, places = torch.tensor([ids, positions, inside], device=device).unbind()
        hidden = F.embedding(tokens, loaded.embedding)
        if loaded.embedding_scale != 1.0:
            hidden = hidden * loaded.embedding_scale
        hidden = self._model.forward(hidden, where, self._attend(self._model, self.pool, blocks, where), places)
        normed = self._model.final_norm(hidden[torch.tensor(asked, device=device)])
        if self._model.selector is None:
            return by_block(blocks, *self._read(normed))
        candidates, logits = self._candidates(normed, self._model.selector.top_k)
        counts = [block.rows - 1 for block in blocks]
        return by_block(blocks, *self._model.selector.choose(normed, candidates, logits, bonus_tokens, counts))

    def _read(self, normed: Tensor) -> Drafts:
        tokens: list[int] = []
        confidence: list[float] = []
        for logits in self._logits(normed):
            ids = logits.argmax(dim=-1, keepdim=True)
            tokens += ids[:, 0].tolist()
            # exp(max - logsumexp); torch's softmax takes a third of the time of its logsumexp on CPU
            confidence += logits.softmax(dim=-1).gather(-1, ids)[:, 0].tolist()
        return tokens, confidence

    def _candidates(self, normed: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best tokens of each row and their logits, [rows, k]."""
        best, ids = zip(*(logits.topk(k, dim=-1) for logits in self._logits(normed)))
        return torch.cat(ids), torch.cat(best)

    def _logits(self, normed: Tensor) -> Iterator[Tensor]:
        for rows in normed.split(max(1, LOGITS_AT_ONCE // self._loaded.vocabulary)):
            yield self._loaded.shaped(self._loaded.head(rows).float())


def by_block(blocks: Sequence[Block], token_ids: list[int], confidence: list[float]) -> list[Drafts]:
    """What was read for all blocks, each block's own."""
    drafts, begin = [], 0
    for block in blocks:
        end = begin + block.rows - 1
        drafts.append((token_ids[begin:end], confidence[begin:end]))
        begin = end
    return drafts
