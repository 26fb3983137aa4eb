"""What has to hold between a deploy file and its checkpoints, checked before anything is started. No torch, no Ray."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from cluster.errors import ConfigError
from deploy.architecture import check_architecture
from deploy.config import Application
from verifier_service.fit import check_fit

CHECKOUT = Path(__file__).resolve().parent.parent


def checked(application: Application) -> Application:
    """The application with absolute checkpoint paths. Raises ConfigError, with the key, the values and the cure.

    A relative path is looked up in the current directory first, then in the checkout that this file is part of.
    """
    verifier, drafter = application.verifier, None
    target = _directory("verifier.target", verifier.target)
    if verifier.architecture is not None:
        check_architecture("verifier.architecture", verifier.architecture, "verifier.target", target)
    if verifier.drafter is not None and verifier.speculation.mode != "none":
        key = "drafter.checkpoint" if application.drafter is not None else "verifier.drafter"
        drafter = _directory(key, verifier.drafter)
        if application.drafter is not None and application.drafter.architecture is not None:
            check_architecture("drafter.architecture", application.drafter.architecture, key, drafter)
    return fitting(application, target, drafter)


def fitting(application: Application, target: Path, checkpoint: Path | None) -> Application:
    """The application with these for its target and its drafter's checkpoint (directories, or config.json alone).

    Raises ConfigError if they do not fit each other or the settings.
    """
    paths = {"target": str(target)} | ({"drafter": str(checkpoint)} if checkpoint is not None else {})
    speculation = application.verifier.speculation
    tables = {name: _table(name, getattr(speculation, name)) for name in ("step_table", "draft_table")}
    found = application.verifier.model_copy(update={**paths, "speculation": speculation.model_copy(update=tables)})
    check_fit(found)
    _check_device("verifier", "rank_resources", found.device, found.bundles[1])
    if application.drafter is None:
        return application.model_copy(update={"verifier": found})
    _check_device("drafter", "resources", application.drafter.device, application.drafter.bundles[1])
    drafter = application.drafter.model_copy(update={"target": found.target, "checkpoint": found.drafter})
    return application.model_copy(update={"verifier": found, "drafter": drafter})


def explained(error: ValidationError) -> list[str]:
    """A line for each thing that pydantic found wrong: where it is, what it holds, what it should hold."""
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        got = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r})"
        lines += [f"{where}: {part}{got}" if where else f"{part}{got}" for part in message.splitlines()]
    return lines


def find_directory(given: str) -> Path | None:
    """A checkpoint's directory, if it is on this machine."""
    return next((candidate for candidate in _places(given) if candidate.is_dir()), None)


def _places(given: str) -> list[Path]:
    path = Path(given).expanduser()
    return [path] if path.is_absolute() else [Path.cwd() / path, CHECKOUT / path]


def _directory(key: str, given: str) -> Path:
    found = find_directory(given)
    if found is None:
        places = " nor ".join(str(candidate) for candidate in dict.fromkeys(_places(given)))
        raise ConfigError(f"{key} is {given!r}, but there is no directory {places}: give a checkpoint's directory")
    if not (found / "config.json").is_file():
        raise ConfigError(f"{key} is {given!r}, but {found} holds no config.json: give a checkpoint's directory")
    if not any(found.glob("*.safetensors")):
        raise ConfigError(f"{key} is {given!r}, but {found} holds no *.safetensors file: the weights are missing")
    return found.resolve()


def _table(name: str, given: str | None) -> str | None:
    """Where the file is, looked up as checkpoints are."""
    if given is None:
        return None
    found = next((candidate for candidate in _places(given) if candidate.is_file()), None)
    if found is None:
        places = " nor ".join(str(candidate) for candidate in dict.fromkeys(_places(given)))
        raise ConfigError(
            f"verifier.speculation.{name} is {given!r}, but there is no file {places}: give a table as "
            "`paceline bench steps` writes it, or leave the key out"
        )
    return str(found.resolve())


def _check_device(section: str, key: str, device: str, bundle: dict[str, float]) -> None:
    if device == "cuda" and bundle.get("GPU", 0) <= 0:
        raise ConfigError(
            f"{section}.device is 'cuda' but {section}.{key} holds no GPU: add GPU: 1, or set device: cpu"
        )
