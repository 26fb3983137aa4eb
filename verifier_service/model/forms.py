"""Which modules mix tokens: two sets, of the same meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from verifier_service.model import touchpoints
from verifier_service.model.delta_rule import replayed_at_once, replayed_token_by_token
from verifier_service.model.gated_delta_net import RaggedGatedDeltaNet
from verifier_service.model.latent_attention import LatentAttention
from verifier_service.model.padded_attention import PaddedAttention
from verifier_service.model.recurrent_state import Replay
from verifier_service.model.sectioned_latents import SectionedLatentAttention
from verifier_service.model.stepwise_delta_net import StepwiseGatedDeltaNet


@dataclass(frozen=True)
class Forms:
    """attention: what transformers' attention modules call, by its name in touchpoints. around: what goes around those.

    replay: how recurrent states commit what `delta_net` kept.
    """

    attention: str
    around: Callable[[nn.Module], nn.Module]
    latent_attention: type[LatentAttention]
    delta_net: type[RaggedGatedDeltaNet]
    replay: Replay


FAST = Forms(touchpoints.PAGED, lambda module: module, LatentAttention, RaggedGatedDeltaNet, replayed_at_once)
# A row's result does not depend on what else is in the step; with DeterministicOperations.
DETERMINISTIC = Forms(
    touchpoints.SECTIONED, PaddedAttention, SectionedLatentAttention, StepwiseGatedDeltaNet, replayed_token_by_token
)
