"""Context features, kept on the host so that a draft context can be built at any time: of running requests by
position, of cached KV blocks by name.

A new drafter, a new epoch of the link or an eviction loses what was sent; the last W tokens' features are sent again
from here. After a prefix hit they are those of the blocks that were found.
"""

from __future__ import annotations

import numpy as np
import torch

from cluster.errors import ConfigError
from verifier_service.feature_pages import FeaturePages, PageTable, Parts

_WORDS = {2: torch.int16, 4: torch.int32}  # numpy knows no bfloat16, and copies rows at the speed of memory


class FeatureStore:
    """Rows of [hidden] in one tensor of at most max_bytes, parted into pages as FeaturePages says.

    Memory is committed as pages are first used. Not thread-safe: the engine's thread owns it. Raises ConfigError if
    max_bytes do not hold one block's features, or cannot be had.
    """

    def __init__(self, max_bytes: int, block_tokens: int, hidden: int, dtype: torch.dtype = torch.float32):
        self._page_bytes = block_tokens * hidden * dtype.itemsize
        total = max_bytes // self._page_bytes
        if total < 1:
            raise ConfigError(
                f"feature_store_bytes is {max_bytes}, but the features of one block of {block_tokens} tokens take "
                f"{self._page_bytes}: raise it"
            )
        self.pages = FeaturePages(total, block_tokens)
        try:
            self._rows = torch.empty(total * block_tokens, hidden, dtype=dtype)
        except RuntimeError as error:
            raise ConfigError(f"feature_store_bytes is {max_bytes}, more than this machine gives: {error}") from error
        self._words = self._rows.view(_WORDS[dtype.itemsize]).numpy()

    @property
    def bytes(self) -> int:
        """What running requests hold."""
        return self.pages.held * self._page_bytes

    @property
    def block_bytes(self) -> int:
        """What is kept for cached blocks alone."""
        return self.pages.idle * self._page_bytes

    def write(self, rows: torch.Tensor, parts: Parts) -> None:
        """Copy rows [count, hidden], on any device, to where these parts say, which are in the order of the rows.

        If two parts name one row of the store, the later counts.
        """
        if not parts.counts:
            return
        target = spans(parts.at, parts.counts)
        data = rows.detach().to("cpu", self._rows.dtype).contiguous()
        words = data.view(_WORDS[data.dtype.itemsize]).numpy()
        self._words[target] = words if len(target) == len(words) else words[spans(parts.of, parts.counts)]

    def read(self, table: PageTable, start: int, end: int) -> tuple[int, torch.Tensor]:
        """Of positions start..end-1 what is held: the first of them, and a copy [count, hidden]."""
        first, parts = self.pages.rows(table, start, end)
        return first, self._rows.index_select(0, torch.from_numpy(spans(parts.at, parts.counts)))


def spans(firsts: list[int], counts: list[int]) -> np.ndarray:
    """int64: first .. first + count - 1 of each pair, one after the other."""
    if counts.count(1) == len(counts):
        return np.array(firsts, np.int64)
    lengths = np.array(counts, np.int64)
    ends = lengths.cumsum()
    return np.repeat(np.array(firsts, np.int64) - ends + lengths, lengths) + np.arange(ends[-1])
