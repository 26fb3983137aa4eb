"""Serve's user_config of the verifier: what may change while it runs, checked before the engine is told."""

from __future__ import annotations

import logging
from typing import Any

from msgspec.structs import asdict
from pydantic import ValidationError

from cluster.contracts import Configure
from verifier_service.config import SpeculationSettings

log = logging.getLogger(__name__)

_SIGNS = {"gt": "> ", "ge": ">= ", "lt": "< ", "le": "<= "}


def live_settings(user_config: dict[str, Any]) -> Configure:
    """`max_draft_tokens` and `soft_deadline_s` within SpeculationSettings' bounds; None leaves a setting as it is.

    Raises ValueError that names the key, its value and its limits.
    """
    unknown = set(user_config) - set(Configure.__struct_fields__)
    if unknown:
        known = ", ".join(Configure.__struct_fields__)
        raise ValueError(f"user_config of Verifier has unknown keys {sorted(unknown)}; it takes {known}")
    given = {key: value for key, value in user_config.items() if value is not None}
    try:
        settings = SpeculationSettings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        limits = f"it must be {_limits(key)}" if _limits(key) else "see SpeculationSettings"
        raise ValueError(
            f"user_config of Verifier: {key} is {given[key]!r}, but {limits} ({first['msg'].lower()})"
        ) from error
    return Configure(**{key: getattr(settings, key) for key in given})


def usable(settings: Configure) -> Configure:
    """What can work of settings that came over the wire: the rest is logged, and leaves its setting as it is."""
    good: dict[str, Any] = {}
    for name, value in asdict(settings).items():
        try:
            good[name] = getattr(live_settings({name: value}), name)
        except ValueError as error:
            log.warning("%s; it is ignored", error)
    return Configure(**good)


def _limits(key: str) -> str:
    """The bounds of a setting as text: "> 0, <= 10"."""
    bounds = SpeculationSettings.model_fields[key].metadata
    found = [
        f"{sign}{getattr(bound, name):g}" for bound in bounds for name, sign in _SIGNS.items() if hasattr(bound, name)
    ]
    return ", ".join(found)
