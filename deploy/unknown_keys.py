"""Keys of a deploy file that no model knows: where they are, and what was probably meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel


def unknown_keys(model: type[BaseModel], raw: Any, where: str = "") -> list[str]:
    """One message for each key of `raw` that `model`, or a model nested in it, does not have."""
    if not isinstance(raw, dict):
        return []
    fields = {alias: field for name, field in model.model_fields.items() for alias in {name, field.alias or name}}
    messages = []
    for key, value in raw.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            messages.append(_message(str(key), where, list(fields)))
            continue
        for nested, item, suffix in _nested(fields[key].annotation, value):
            messages += unknown_keys(nested, item, path + suffix)
    return messages


def _message(key: str, where: str, known: list[str]) -> str:
    place = f" in {where}" if where else ""
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
    if close:
        return f"unknown key {key!r}{place}: did you mean {' or '.join(repr(name) for name in close)}?"
    return f"unknown key {key!r}{place}: known keys are {', '.join(sorted(known))}"


def _nested(annotation: Any, value: Any) -> Iterator[tuple[type[BaseModel], Any, str]]:
    """The models that `annotation` holds, with the part of `value` that each describes."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, value, ""
        return
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _nested(argument, value)
    elif origin in (list, tuple) and isinstance(value, list):
        for index, item in enumerate(value):
            for nested, part, suffix in _nested(typing.get_args(annotation)[0], item):
                yield nested, part, f"[{index}]{suffix}"
