"""Everything a drafter holds in memory, read from two checkpoints and checked before anything is served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.errors import ConfigError
from drafter_service.config import DrafterSettings
from drafter_service.fused import FusedDFlash
from drafter_service.model import DFlashModel
from modeling.dflash import SLIDING, DFlashConfig, DraftCheckpointError, drafter_version, feature_version, read_weights
from modeling.errors import CheckpointError
from modeling.fixed_linear import Linear, fixed_linear
from modeling.head import load_embedding_and_head
from modeling.kernel_choice import wants_triton
from modeling.pair import PairError, check_pair
from modeling.target_config import TargetConfig, read_target_config, target_fingerprint


@dataclass(frozen=True)
class LoadedDrafter:
    """embedding [vocabulary or more, hidden] and head ([n, hidden] -> [n, vocabulary]) are the target's.

    window: context rows kept per context, in tokens. embedding_scale, output_multiplier, softcap (0 = none): of the
    checkpoint's `dflash_config`. head_weight [vocabulary, hidden]: kept for the kernels only, which read it themselves.
    """

    config: DFlashConfig
    model: FusedDFlash
    embedding: Tensor
    head: Linear
    window: int
    vocabulary: int
    target_fingerprint: str
    feature_version: str
    drafter_version: str
    embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    softcap: float = 0.0
    head_weight: Tensor | None = None

    def shaped(self, logits: Tensor) -> Tensor:
        """Logits as the checkpoint wants them read. The most probable token stays the same."""
        if self.output_multiplier != 1.0:
            logits = logits * self.output_multiplier
        if self.softcap > 0:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def load_drafter(settings: DrafterSettings) -> LoadedDrafter:
    """Raises ConfigError naming the setting or the checkpoint's field, its value and the cure."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("drafter.device is 'cuda' but torch finds no CUDA device: set device to 'cpu'")
    try:
        triton = wants_triton(settings.kernels, settings.device)
    except ValueError as error:
        raise ConfigError(f"drafter.{error}") from error
    try:
        return _load(settings, triton)
    except DraftCheckpointError as error:
        raise ConfigError(f"drafter.checkpoint: {error}") from error
    except PairError as error:
        raise ConfigError(f"drafter.checkpoint does not fit drafter.target: {error}") from error
    except CheckpointError as error:
        raise ConfigError(f"drafter.target: {error}") from error


def context_window(config: DFlashConfig, settings: DrafterSettings, target: TargetConfig) -> int:
    """Context rows worth keeping: the checkpoint's window if no layer looks further, else the one that is set."""
    sliding = all(kind == SLIDING for kind in config.layer_types)
    window = config.sliding_window if sliding and config.sliding_window is not None else settings.window
    return min(window, target.max_context)


def _load(settings: DrafterSettings, triton: bool) -> LoadedDrafter:
    config = DFlashConfig.load(settings.checkpoint)
    target = read_target_config(settings.target)
    check_pair(config, target)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    model = FusedDFlash(DFlashModel.load(settings.checkpoint, dtype, settings.device))
    embedding, head = load_embedding_and_head(settings.target, dtype, settings.device)
    for name, tensor in (("token embedding", embedding), ("output head", head)):
        if tensor.shape[0] < target.vocabulary or tensor.shape[1] != config.hidden:
            raise ConfigError(
                f"drafter.target: the {name} of {settings.target} is {tuple(tensor.shape)}, but its config.json says "
                f"({target.vocabulary}, {config.hidden}): download the checkpoint again"
            )
    fused = read_weights(Path(settings.checkpoint), ("fc.weight", "hidden_norm.weight"))
    extra: dict[str, Any] = config.raw | (config.raw.get("dflash_config") or {})
    return LoadedDrafter(
        config=config,
        model=model,
        embedding=embedding,
        head=fixed_linear(head[: target.vocabulary]),
        window=context_window(config, settings, target),
        vocabulary=target.vocabulary,
        target_fingerprint=target_fingerprint(settings.target),
        feature_version=feature_version(fused["fc.weight"], fused["hidden_norm.weight"], config.target_layer_ids),
        drafter_version=drafter_version(settings.checkpoint),
        embedding_scale=float(extra.get("input_embedding_scale") or 1.0),
        output_multiplier=float(extra.get("output_multiplier") or 1.0),
        softcap=float(extra.get("final_logit_softcapping") or 0.0),
        head_weight=head[: target.vocabulary] if triton else None,
    )
