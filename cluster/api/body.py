"""From a request's bytes to a validated model, or to a RequestError that names the field, its value and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

import pydantic_core
from pydantic import ValidationError

from cluster.api.schema import SamplingFields
from cluster.errors import RequestError

R = TypeVar("R", bound=SamplingFields)
MAX_SHOWN = 80

# Fields of OpenAI's API that change nothing about the tokens.
HARMLESS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}


def _among(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


# Fields that are not supported: only a value that asks for nothing is accepted.
UNSUPPORTED: dict[str, Callable[[Any], bool]] = {
    "audio": _among(),
    "best_of": _among(1),
    "function_call": _among("none"),
    "functions": _among([]),
    "guided_choice": _among(),
    "guided_grammar": _among(),
    "guided_json": _among(),
    "guided_regex": _among(),
    "modalities": _among(["text"]),
    "prediction": _among(),
    "prompt_logprobs": _among(),
    "reasoning_effort": _among("none"),
    "suffix": _among(""),
    "tool_choice": _among("none", "auto"),
    "tools": _among([]),
    "verbosity": _among("medium"),
    "web_search_options": _among(),
}


def parse(model: type[R], body: bytes) -> R:
    """Raises RequestError. A field that is null is as if it were not there."""
    try:
        raw = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(raw)}")
    fields = {name: value for name, value in raw.items() if value is not None and name not in HARMLESS}
    for name in sorted(UNSUPPORTED.keys() & fields.keys()):
        value = fields.pop(name)
        if name == "best_of" and value == fields.get("n", 1):
            continue
        if not UNSUPPORTED[name](value):
            cure = "use structured_outputs" if name.startswith("guided_") else "leave it out"
            raise RequestError(f"{name} is not supported by this server (got {_shown(value)}): {cure}", name)
    if unknown := sorted(fields.keys() - model.model_fields.keys()):
        raise RequestError(_unknown(unknown[0], list(model.model_fields)), unknown[0])
    try:
        return model.model_validate(_without_null(fields))
    except ValidationError as error:
        raise _first(error) from error


def _without_null(fields: dict[str, Any]) -> dict[str, Any]:
    """Null inside messages and options is as if absent too."""
    clean = dict(fields)
    if isinstance(messages := fields.get("messages"), list):
        clean["messages"] = [
            {name: value for name, value in message.items() if value is not None}
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    return clean


def _first(error: ValidationError) -> RequestError:
    item = error.errors(include_url=False, include_context=False)[0]
    field = _path(item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if not field:  # fields that contradict each other: the message names them
        return RequestError(message, message.split(" ", 1)[0])
    if item["type"] == "missing":
        return RequestError(f"{field} is missing: it is required", field)
    if item["type"] == "extra_forbidden":
        return RequestError(f"{field} is not known to this server: leave it out", field)
    if item["type"] == "value_error":
        return RequestError(f"{field} {message}", field)
    return RequestError(f"{field}: {_lower(message)} (got {_shown(item['input'])})", field)


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    meant = f": did you mean {close[0]}?" if close else ": leave it out"
    return f"{name[:MAX_SHOWN]} is not a field that this server knows{meant}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
