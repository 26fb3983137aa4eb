"""Builds one rank's mixture of experts from transformers' block and this rank's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modeling.experts import Experts, ExpertWeights
from modeling.gates import ClampedGate
from modeling.moe import SharedExpert, SparseMoe
from modeling.operations import Operations
from modeling.quantized.packed import BlockPacked, Weight, stacked_rows
from modeling.ranks import RankGroup
from modeling.routing import Route, SigmoidTopK, SoftmaxTopK
from modeling.weights import RankWeights
from verifier_service.model import touchpoints


def load_moe(block: Any, prefix: str, weights: RankWeights, ranks: RankGroup, operations: Operations) -> nn.Module:
    """prefix: of the block's tensors (`layers.3.mlp.`). Raises CheckpointError for a missing or misshapen one."""
    if touchpoints.is_gpt_oss_moe(block):
        return touchpoints.ScoredMlp(_gpt_oss(block, prefix, weights, ranks, operations))
    router = weights.take(f"{prefix}gate.weight", tuple(block.gate.weight.shape))
    route: Route
    if touchpoints.is_sigmoid_router(block.gate):
        router = router.float()  # as the stock model does: scores of hundreds of experts lie close together
        correction = f"{prefix}gate.e_score_correction_bias"
        route = SigmoidTopK(
            weights.take(correction, (len(router),), torch.float32),
            top_k=block.gate.top_k,
            groups=block.gate.num_group,
            best_groups=block.gate.topk_group,
            normalized=block.gate.norm_topk_prob,
            scale=block.gate.routed_scaling_factor,
            sigmoid=operations.elementwise(torch.sigmoid),
        )
    else:
        route = SoftmaxTopK(block.gate.top_k, getattr(block.gate, "norm_topk_prob", True))
    return SparseMoe(
        router,
        _experts(block.experts, prefix, weights, operations),
        _shared_expert(block, prefix, weights),
        route=route,
        ranks=ranks,
        operations=operations,
    )


def _experts(module: Any, prefix: str, weights: RankWeights, operations: Operations) -> Experts:
    return operations.experts(
        ExpertWeights(
            gate_up=weights.take_matrix(f"{prefix}experts.gate_up_proj", tuple(module.gate_up_proj.shape)),
            down=weights.take_matrix(f"{prefix}experts.down_proj", tuple(module.down_proj.shape)),
        )
    )


def _shared_expert(block: Any, prefix: str, weights: RankWeights) -> SharedExpert | None:
    name = next((name for name in ("shared_expert", "shared_experts") if hasattr(block, name)), None)
    if name is None:
        return None
    expert = getattr(block, name)
    gate, up, down = (
        weights.take_matrix(f"{prefix}{name}.{part}.weight", tuple(getattr(expert, part).weight.shape))
        for part in ("gate_proj", "up_proj", "down_proj")
    )
    gating = None
    if hasattr(block, "shared_expert_gate"):
        gating = weights.take(f"{prefix}shared_expert_gate.weight", tuple(block.shared_expert_gate.weight.shape))
    return SharedExpert(gate_up=stacked_rows([gate, up]), down=down, gate=gating)


def _gpt_oss(block: Any, prefix: str, weights: RankWeights, ranks: RankGroup, operations: Operations) -> SparseMoe:
    """Biases everywhere; gate and up come in turns, and unpacked matrices are [in, out]."""

    def take(name: str) -> torch.Tensor:
        return weights.take(prefix + name, tuple(block.get_parameter(name).shape))

    def take_transposed(name: str) -> Weight:
        return weights.take_transposed(prefix + name, tuple(block.get_parameter(name).shape))

    down_bias = take("experts.down_proj_bias")
    experts = ExpertWeights(
        gate_up=_gates_first(take_transposed("experts.gate_up_proj")),
        down=take_transposed("experts.down_proj"),
        gate_up_bias=_biases_first(take("experts.gate_up_proj_bias")),
        down_bias=down_bias if ranks.rank == 0 else None,
    )
    return SparseMoe(
        take("router.weight"),
        operations.experts(experts, ClampedGate(block.experts.alpha, block.experts.limit)),
        None,
        route=SoftmaxTopK(block.router.top_k, normalized=True),
        ranks=ranks,
        operations=operations,
        router_bias=take("router.bias"),
    )


def _gates_first(interleaved: Weight) -> Weight:
    """[experts, gate, up, gate, up, .., ...] -> [experts, all gates, all ups, ...]; a tensor in the same memory."""
    if isinstance(interleaved, torch.Tensor):
        return _biases_first(interleaved)
    assert isinstance(interleaved, BlockPacked), "gate and up are read together"
    return stacked_rows([interleaved.every(first, 2) for first in (0, 1)])


def _biases_first(interleaved: torch.Tensor) -> torch.Tensor:
    for expert in interleaved:
        expert.copy_(torch.cat([expert[::2], expert[1::2]]))
    return interleaved
