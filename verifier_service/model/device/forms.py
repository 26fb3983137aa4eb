"""How tokens meet over kernels: two sets, of the same meaning."""

from __future__ import annotations

from dataclasses import dataclass

from verifier_service.model.device.buckets import SECTION
from verifier_service.model.device.delta_net import KernelGatedDeltaNet
from verifier_service.model.device.expanding_latents import ExpandingLatentAttention
from verifier_service.model.device.latent_attention import KernelLatentAttention, TiledKernelLatentAttention
from verifier_service.model.device.stepwise_delta_net import StepwiseKernelDeltaNet


@dataclass(frozen=True)
class KernelForms:
    """section: multiples at which attention cuts contexts, None = as it is fastest. shards: whether truncation may be
    decided from the shards of the vocabulary, whose masses round otherwise than those of a whole row.
    """

    delta_net: type[KernelGatedDeltaNet]
    latent_attention: type[KernelLatentAttention]
    section: int | None
    shards: bool


FAST = KernelForms(KernelGatedDeltaNet, ExpandingLatentAttention, None, shards=True)
# A row's result does not depend on what else is in the step; with DeterministicTritonOperations.
DETERMINISTIC = KernelForms(StepwiseKernelDeltaNet, TiledKernelLatentAttention, SECTION, shards=False)
