"""Operations whose results depend on their own row alone: not on the batch, nor on how ranks divide the model.

On batch invariance: Thinking Machines, "Defeating Nondeterminism in LLM Inference", 2025. How: tiles.py for products
and sums, full_vectors.py for what is elementwise. Norms and softmax of torch reduce each row by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modeling.experts import Experts, ExpertWeights
from modeling.fixed_linear import Linear
from modeling.full_vectors import FullVectorGate, FullVectors
from modeling.gates import Gate, silu_gate
from modeling.norms import FusedRMSNorm
from modeling.operations import Elementwise
from modeling.quantized.packed import Weight
from modeling.ranks import RankGroup
from modeling.routing import Route
from modeling.tiles import LEAVES, TiledProduct, check_places, leaves_of, tree_sum


class DeterministicOperations:
    """An Operations for CPU. Multiplies and adds in float32; results have `dtype`. size: ranks, 1, 2, 4 or 8.

    A partial is float32 [leaves of this rank, tokens, out]. What makes products raises CheckpointError on a machine
    that cannot keep the promise.
    """

    def __init__(self, dtype: torch.dtype, size: int = 1):
        if LEAVES % size:
            raise ValueError(f"{size} ranks cannot share {LEAVES} leaves: 1, 2, 4 and 8 can")
        self._dtype, self._size = dtype, size
        self._checked: set[int] = set()  # depths

    def linear(self, weight: Weight, bias: Tensor | None = None) -> Linear:
        multiply = self._product(weight, 1)

        def linear(x: Tensor) -> Tensor:
            y = multiply(x.reshape(1, -1, x.shape[-1]))[0]
            if bias is not None:
                y = y.add_(bias)
            return y.to(x.dtype).view(*x.shape[:-1], -1)

        return linear

    def head(self, weight: Weight) -> Linear:
        return self.linear(weight)

    def partial_linear(self, weight: Weight) -> Linear:
        """Raises CheckpointError for a weight that cannot be cut into leaves, too."""
        leaves = leaves_of(weight.shape[-1] * self._size, self._size)
        multiply = self._product(weight, leaves)
        return lambda x: multiply(x.unflatten(1, (leaves, -1)).transpose(0, 1))

    def experts(self, weights: ExpertWeights, gate: Gate = silu_gate) -> Experts:
        """Raises CheckpointError as partial_linear does."""
        gate_up, down = weights.gate_up, weights.down
        biases = weights.gate_up_bias
        return LeafedExperts(
            [self.linear(gate_up[e], None if biases is None else biases[e]) for e in range(len(gate_up))],
            [self.partial_linear(down[e]) for e in range(len(down))],
            weights.down_bias,
            self.gate(gate),
        )

    def norm(self, weight: Tensor, eps: float, zero_centered: bool) -> nn.Module:
        return FusedRMSNorm(weight, eps, zero_centered)

    def elementwise(self, function: Elementwise) -> Elementwise:
        return FullVectors(function)

    def gate(self, gate: Gate) -> Gate:
        return FullVectorGate(gate)

    def route(self, route: Route) -> Route:
        return route

    def total(self, partial: Tensor, ranks: RankGroup) -> Tensor:
        branch = tree_sum(partial)
        if ranks.size > 1:
            branch = tree_sum(torch.stack(ranks.gather(branch)))
        return branch.to(self._dtype)

    def _product(self, weight: Weight, leaves: int) -> TiledProduct:
        depth = weight.shape[-1] // leaves
        if depth not in self._checked:
            check_places(depth)
            self._checked.add(depth)
        return TiledProduct(weight, leaves)


class LeafedExperts:
    """The chosen experts one after the other, each over its own tokens. Implements experts.Experts.

    gate_up, down: by expert; down gives partials. down_bias [experts, hidden]: of the first rank, into its first leaf.
    """

    def __init__(self, gate_up: list[Linear], down: list[Linear], down_bias: Tensor | None, gate: Gate):
        self.gate_up, self.down, self.down_bias, self.gate = gate_up, down, down_bias, gate

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """As Experts; returns float32 [leaves, tokens, hidden]. A token's experts are added in the router's order."""
        pairs = chosen.view(-1)
        order = torch.argsort(pairs)
        counts = torch.bincount(pairs, minlength=len(self.gate_up)).tolist()
        hit = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in hit]
        parts = x.index_select(0, order // chosen.shape[1]).split(sizes)
        inner = self.gate(torch.cat([self.gate_up[e](part) for e, part in zip(hit, parts, strict=True)]))
        outer = torch.cat([self.down[e](part) for e, part in zip(hit, inner.split(sizes), strict=True)], dim=1)
        if self.down_bias is not None:
            outer[0] += self.down_bias[pairs[order]]
        sorted_back = torch.empty_like(outer)
        sorted_back[:, order] = outer
        return _weighted(sorted_back.unflatten(1, chosen.shape), weights.float())


def _weighted(outputs: Tensor, weights: Tensor) -> Tensor:
    """outputs [leaves, tokens, top_k, hidden], weights [tokens, top_k] -> [leaves, tokens, hidden]."""
    total = outputs[:, :, 0] * weights[:, :1]
    for rank in range(1, weights.shape[1]):
        total += outputs[:, :, rank] * weights[:, rank, None]
    return total
