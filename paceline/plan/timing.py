"""Seconds of a target's step and of a draft, from bytes that are read and operations that are done.

A roofline with constants, for sizing: how many drafters a verifier wants, not how fast either will be. What the
engine measures while it serves is what speculation is controlled by.
"""

from __future__ import annotations

from dataclasses import dataclass

from modeling.footprint import CacheFootprint, Part, RoutedExperts
from paceline.plan.gpus import Gpu
from paceline.plan.memory import DrafterModel

BANDWIDTH_SHARE = 0.75  # of the published rates: what good kernels reach
FLOPS_SHARE = 0.6
LINK_SHARE = 0.7
# What a layer costs however little it reads: with these, one stream of Qwen3.5-397B on 8 x B200 decodes the 203 tokens
# a second that are published of it.
LAYER_S = 40e-6
ALL_REDUCE_S = 15e-6  # two a layer
DRAFT_S = 300e-6  # link round trip, batching and launches of a draft


@dataclass(frozen=True)
class TargetCost:
    """A target as one of `size` ranks computes it. hidden: its width, all-reduced twice a layer and token."""

    parts: tuple[Part, ...]
    cache: CacheFootprint
    experts: RoutedExperts | None
    layers: int
    hidden: int
    itemsize: int
    size: int

    def step_s(self, gpu: Gpu, requests: float, rows: float, context: float) -> float:
        """One step over `requests` requests of `context` tokens, `rows` tokens each (1 = plain decoding)."""
        tokens = requests * rows
        read = self._weight_bytes(tokens) + requests * (
            context * self.cache.token_bytes + 2 * self.cache.state_bytes  # a state is read and written
        )
        operations = tokens * (self._flops() + context * self.cache.attended_flops)
        busy = max(read / (gpu.bandwidth * BANDWIDTH_SHARE), operations / (gpu.flops * FLOPS_SHARE))
        return busy + self.layers * LAYER_S + self.all_reduces_s(gpu, tokens)

    def _weight_bytes(self, tokens: float) -> float:
        share = self.experts.touched(tokens) / self.experts.count if self.experts else 1.0
        return sum(self._used(part, share) * part.rank_bytes for part in self.parts)

    def _flops(self) -> float:
        """Of one token's products with the weights, on one rank."""
        share = self.experts.per_token / self.experts.count if self.experts else 1.0
        return sum(2 * self._used(part, share) * part.rank_parameters for part in self.parts)

    @staticmethod
    def _used(part: Part, expert_share: float) -> float:
        return {"experts": expert_share, "embedding": 0.0}.get(part.name, 1.0)

    def all_reduces_s(self, gpu: Gpu, tokens: float) -> float:
        """What `size` ranks wait for each other in one step, two sums a layer."""
        if self.size == 1:
            return 0.0
        moved = 2 * (self.size - 1) / self.size * tokens * self.hidden * self.itemsize
        return 2 * self.layers * (ALL_REDUCE_S + moved / (gpu.link * LINK_SHARE))


def draft_s(drafter: DrafterModel, gpu: Gpu, contexts: float, rows: float, attended: float) -> float:
    """One draft for `contexts` contexts, `rows` block rows each (the bonus token's included), over `attended` tokens.

    The head is read once and applied to every row but the bonus token's.
    """
    read = (drafter.layers + drafter.norms + drafter.head) * drafter.itemsize + contexts * attended * drafter.row_bytes
    per_row = 2 * drafter.layers + attended * drafter.attended_flops
    operations = contexts * (rows * per_row + (rows - 1) * 2 * drafter.head)
    return DRAFT_S + max(read / (gpu.bandwidth * BANDWIDTH_SHARE), operations / (gpu.flops * FLOPS_SHARE))


def acceptance_rate(acceptance_length: float, block_size: int) -> float:
    """Chance p of each further draft for which a whole block gives this acceptance length: 1 + p + ... + p^(B-1).

    Raises ValueError if no p does.
    """
    if not 1.0 <= acceptance_length <= block_size:
        raise ValueError(
            f"an acceptance length of {acceptance_length} is not between 1 and the block size {block_size}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if committed(middle, block_size - 1) < acceptance_length else (low, middle)
    return (low + high) / 2


def committed(rate: float, drafts: int) -> float:
    """Expected tokens of a step with `drafts` draft tokens, each accepted with `rate` if all before it were."""
    return sum(rate**position for position in range(drafts + 1))
