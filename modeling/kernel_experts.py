"""Routed experts and their choice over the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from kernels.linear.matrix import Matrix
from kernels.moe.kernel import assign, combine, down, gate_up, tile_rows
from kernels.routing.kernel import sigmoid_top_k, softmax_top_k
from modeling.experts import ExpertWeights
from modeling.gates import ClampedGate, Gate, silu_gate
from modeling.kernel_linear import sections_of_input
from modeling.kernel_weights import matrices_of
from modeling.quantized.packed import StackedRows, Weight
from modeling.routing import Route, SigmoidTopK, SoftmaxTopK


class TritonExperts:
    """An Experts over weights of any format; nothing in it waits for the device.

    leaves: None, or of this rank, for a deterministic partial float32 [leaves, tokens, hidden]. Raises ValueError for a
    gate that no kernel knows, and for gates packed otherwise than the values that they weigh.
    """

    def __init__(self, weights: ExpertWeights, gate: Gate = silu_gate, *, leaves: int | None = None):
        self._gate, self._up = _gate_and_up(weights.gate_up)
        (self._down,) = matrices_of(weights.down)
        self._bias, self._down_bias = weights.gate_up_bias, weights.down_bias
        self._clamp = _clamp(gate)
        self._leaves = leaves
        self._sections = None if leaves is None else sections_of_input(self._gate.shape[-1])

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """As Experts; choices of -1 add nothing."""
        chosen = chosen.contiguous()
        tiles = assign(chosen, self._gate.shape[0], tile_rows(chosen.numel(), self._gate))
        inner = gate_up(
            x, self._gate, self._up, tiles, chosen, bias=self._bias, clamp=self._clamp, sections=self._sections
        )
        outer = down(inner, self._down, tiles, leaves=self._leaves)
        total = combine(outer, weights.contiguous(), chosen, self._down_bias, dtype=outer.dtype)
        return total[0] if self._leaves is None else total


def triton_route(route: Route) -> Route:
    """The same choice in one launch. Of equal scores the lowest expert wins. Raises ValueError for an unknown one."""
    if isinstance(route, SoftmaxTopK):
        return lambda logits: softmax_top_k(logits, route.top_k, normalized=route.normalized)
    if isinstance(route, SigmoidTopK):
        return lambda logits: sigmoid_top_k(
            logits,
            route.correction,
            route.top_k,
            groups=route.groups,
            best_groups=route.best_groups,
            normalized=route.normalized,
            scale=route.scale,
        )
    raise ValueError(f"no kernel chooses experts as {type(route).__name__} does")


def _gate_and_up(weight: Weight) -> tuple[Matrix, Matrix]:
    """[experts, 2 x width, hidden], all gates first, halved: in the memory that it has."""
    if isinstance(weight, StackedRows) and len(weight.parts) == 2:
        (gate,), (up,) = (matrices_of(part) for part in weight.parts)
        return gate, up
    (both,) = matrices_of(weight)
    width = both.shape[-2] // 2
    return both.rows(0, width), both.rows(width, 2 * width)


def _clamp(gate: Gate) -> tuple[float, float] | None:
    if isinstance(gate, ClampedGate):
        return gate.alpha, gate.limit
    if gate is silu_gate:
        return None
    raise ValueError(f"no kernel computes the gate {gate}")
