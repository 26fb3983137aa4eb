"""What has to hold between a deploy file and its checkpoints, checked before anything is started. No torch, no Ray."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from cluster.errors import ConfigError
from deploy.config import Application
from modeling.dflash_config import DFlashConfig, DraftCheckpointError
from modeling.errors import CheckpointError
from modeling.families import shard_map
from modeling.target_config import TargetConfig, read_target_config

CHECKOUT = Path(__file__).resolve().parent.parent


def checked(application: Application) -> Application:
    """The application with absolute checkpoint paths. Raises ConfigError, with the key, the values and the cure.

    A relative path is looked up in the current directory first, then in the checkout that this file is part of.
    """
    verifier = application.verifier
    target_dir = _directory("verifier.target", verifier.target)
    target = _target(target_dir, verifier.tensor_parallel_size)
    if verifier.max_context is not None and verifier.max_context > target.max_context:
        raise ConfigError(
            f"verifier.max_context is {verifier.max_context} but {target_dir} was made for {target.max_context} "
            "positions: lower it or leave it out"
        )
    changes: dict[str, object] = {"target": str(target_dir)}
    if verifier.drafter is not None and verifier.speculation.mode != "none":
        drafter_dir = _directory("drafter.checkpoint" if application.drafter else "verifier.drafter", verifier.drafter)
        _check_pair(_draft(drafter_dir), target)
        changes["drafter"] = str(drafter_dir)
    _check_device(application)
    result = application.model_copy(update={"verifier": verifier.model_copy(update=changes)})
    if application.drafter is None or "drafter" not in changes:
        return result
    drafter = {"target": changes["target"], "checkpoint": changes["drafter"]}
    return result.model_copy(update={"drafter": application.drafter.model_copy(update=drafter)})


def explained(error: ValidationError) -> list[str]:
    """A line for each thing that pydantic found wrong: where it is, what it holds, what it should hold."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        got = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r})"
        lines += [f"{where}: {part}{got}" if where else f"{part}{got}" for part in message.splitlines()]
    return lines


def _directory(key: str, given: str) -> Path:
    path = Path(given).expanduser()
    tried = [path] if path.is_absolute() else [Path.cwd() / path, CHECKOUT / path]
    found = next((candidate for candidate in tried if candidate.is_dir()), None)
    if found is None:
        places = " nor ".join(str(candidate) for candidate in dict.fromkeys(tried))
        raise ConfigError(f"{key} is {given!r}, but there is no directory {places}: give a checkpoint's directory")
    if not (found / "config.json").is_file():
        raise ConfigError(f"{key} is {given!r}, but {found} holds no config.json: give a checkpoint's directory")
    return found.resolve()


def _target(directory: Path, tensor_parallel_size: int) -> TargetConfig:
    try:
        target = read_target_config(directory)
        shard_map(target, tensor_parallel_size)
    except CheckpointError as error:
        raise ConfigError(f"verifier.target: {error}") from error
    return target


def _draft(directory: Path) -> DFlashConfig:
    try:
        return DFlashConfig.load(directory)
    except DraftCheckpointError as error:
        raise ConfigError(f"drafter.checkpoint: {error}") from error


def _check_pair(draft: DFlashConfig, target: TargetConfig) -> None:
    for field, of_draft, name, of_target in (
        ("hidden_size", draft.hidden, "hidden_size", target.hidden),
        ("vocab_size", draft.vocabulary, "vocab_size", target.vocabulary),
        ("num_target_layers", draft.num_target_layers, "num_hidden_layers", target.layers),
    ):
        if of_draft != of_target:
            raise ConfigError(
                f"drafter.checkpoint does not fit verifier.target: {field} is {of_draft} in "
                f"{draft.directory / 'config.json'}, but {name} is {of_target} in "
                f"{target.directory / 'config.json'}; use a drafter that was trained for this target"
            )
    if not 0 <= draft.mask_token_id < target.vocabulary:
        raise ConfigError(
            f"drafter.checkpoint does not fit verifier.target: mask_token_id {draft.mask_token_id} in "
            f"{draft.directory / 'config.json'} is outside the target's vocabulary of {target.vocabulary}"
        )


def _check_device(application: Application) -> None:
    parts = [("verifier", "rank_resources", application.verifier.device, application.verifier.bundles[1])]
    if application.drafter is not None:
        parts.append(("drafter", "resources", application.drafter.device, application.drafter.bundles[1]))
    for section, key, device, bundle in parts:
        if device == "cuda" and bundle.get("GPU", 0) <= 0:
            raise ConfigError(
                f"{section}.device is 'cuda' but {section}.{key} holds no GPU: add GPU: 1, or set device: cpu"
            )
