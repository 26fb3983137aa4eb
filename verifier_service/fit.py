"""Do the settings' checkpoints exist, and fit each other? Asked before anything is loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import ConfigError
from modeling.dflash_config import DFlashConfig, DraftCheckpointError
from modeling.errors import CheckpointError
from modeling.families import shard_map
from modeling.target_config import TargetConfig, read_target_config
from verifier_service.config import VerifierSettings


@dataclass(frozen=True)
class Fit:
    """What the checkpoints say. drafter: None for plain decoding."""

    target: TargetConfig
    drafter: DFlashConfig | None


def check_fit(settings: VerifierSettings) -> Fit:
    """Raises ConfigError naming the key, both values and the cure."""
    try:
        target = read_target_config(settings.target)
        shard_map(target, settings.tensor_parallel_size)
    except CheckpointError as error:
        raise ConfigError(f"verifier.target: {error}") from error
    if settings.max_context is not None and settings.max_context > target.max_context:
        raise ConfigError(
            f"verifier.max_context is {settings.max_context}, but {target.directory} was made for "
            f"{target.max_context} positions: lower it or leave it out"
        )
    if settings.speculation.mode == "none" or settings.drafter is None:
        return Fit(target, None)
    try:
        drafter = DFlashConfig.load(settings.drafter)
    except DraftCheckpointError as error:
        raise ConfigError(f"verifier.drafter: {error}") from error
    _check_pair(drafter, target)
    return Fit(target, drafter)


def _check_pair(drafter: DFlashConfig, target: TargetConfig) -> None:
    cure = "use a drafter that was trained for this target"
    beyond = [layer for layer in drafter.target_layer_ids if layer >= target.layers]
    if beyond:
        raise ConfigError(
            f"verifier.drafter {drafter.directory} taps the target's layers {beyond}, but {target.directory} has "
            f"layers 0..{target.layers - 1}: {cure}"
        )
    for key, of_drafter, theirs, of_target in (
        ("hidden_size", drafter.hidden, "hidden_size", target.hidden),
        ("vocab_size", drafter.vocabulary, "vocab_size", target.vocabulary),
        ("num_target_layers", drafter.num_target_layers, "num_hidden_layers", target.layers),
    ):
        if of_drafter != of_target:
            raise ConfigError(
                f"verifier.drafter {drafter.directory} does not fit verifier.target: {key} is {of_drafter}, but "
                f"{theirs} is {of_target} in {target.directory}: {cure}"
            )
    if not 0 <= drafter.mask_token_id < target.vocabulary:
        raise ConfigError(
            f"verifier.drafter {drafter.directory} does not fit verifier.target: mask_token_id {drafter.mask_token_id} "
            f"is outside the vocabulary of {target.vocabulary} in {target.directory}: {cure}"
        )
