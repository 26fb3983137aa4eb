"""Shipped configurations of public checkpoints: what a deploy file may name where the checkpoint is elsewhere."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from modeling.target_config import configuration_file

SHIPPED = Path(__file__).resolve().parent / "architectures"


def shipped_names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def shipped(key: str, name: str) -> Path:
    """The configuration called `name`. Raises ConfigError, with what was probably meant, if there is none."""
    path = SHIPPED / f"{name}.json"
    if name in shipped_names():
        return path
    close = difflib.get_close_matches(name, shipped_names(), n=3, cutoff=0.4) or shipped_names()
    raise ConfigError(f"{key} is {name!r}, which is not one of {SHIPPED}: did you mean {', '.join(close)}?")


def check_architecture(key: str, name: str, checkpoint_key: str, checkpoint: Path) -> None:
    """Raises ConfigError if the checkpoint's own config.json has other dimensions than the shipped one."""
    of_ours, of_theirs = _dimensions(shipped(key, name)), _dimensions(configuration_file(checkpoint))
    other = [field for field, value in of_ours.items() if field in of_theirs and of_theirs[field] != value]
    if other:
        shown = "; ".join(f"{field} is {of_theirs[field]!r}, not {of_ours[field]!r}" for field in other[:3])
        raise ConfigError(
            f"{key} is {name!r}, but {checkpoint_key} {checkpoint} is another model ({shown}): "
            f"name its own architecture, or leave {key} out"
        )


def _dimensions(path: Path) -> dict[str, Any]:
    """What shapes depend on: the model's type and its whole numbers, token ids apart."""
    raw = json.loads(path.read_text())
    text = raw.get("text_config") or raw
    return {
        name: value
        for name, value in text.items()
        if name == "model_type"
        or (isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_token_id"))
    }
