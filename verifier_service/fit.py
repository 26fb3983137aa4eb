"""Do the settings' checkpoints exist, and fit each other? Asked before anything is loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError
from modeling.dflash_config import DFlashConfig, DraftCheckpointError
from modeling.errors import CheckpointError
from modeling.families import shard_map
from modeling.kernel_choice import wants_triton
from modeling.pair import PairError, check_pair
from modeling.target_config import TargetConfig, read_target_config
from verifier_service.config import VerifierSettings
from verifier_service.step_tables.tables import read_draft_table, read_verify_table


@dataclass(frozen=True)
class Fit:
    """What the checkpoints say. drafter: None for plain decoding."""

    target: TargetConfig
    drafter: DFlashConfig | None


def check_fit(settings: VerifierSettings) -> Fit:
    """Raises ConfigError naming the key, both values and the cure."""
    try:
        wants_triton(settings.kernels, settings.device)
    except ValueError as error:
        raise ConfigError(f"verifier.{error}") from error
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
    speculation = settings.speculation
    if speculation.step_table is not None:
        read_verify_table(Path(speculation.step_table))
    if speculation.mode == "none" or settings.drafter is None:
        return Fit(target, None)
    try:
        drafter = DFlashConfig.load(settings.drafter)
        check_pair(drafter, target)
    except DraftCheckpointError as error:
        raise ConfigError(f"verifier.drafter: {error}") from error
    except PairError as error:
        raise ConfigError(f"verifier.drafter does not fit verifier.target: {error}") from error
    if speculation.draft_table is not None:
        read_draft_table(Path(speculation.draft_table)).check_block(drafter.block_size, speculation.draft_table)
    return Fit(target, drafter)
