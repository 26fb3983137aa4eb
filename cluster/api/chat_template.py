"""A checkpoint's chat template, rendered as transformers renders it: same sandbox, options, functions, variables."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import ConfigError, RequestError
from cluster.tokenizer_files import read_json


class ChatTemplate:
    """source: Jinja. special_tokens: bos_token, eos_token, ... as the template may use them. where: it was found."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str = "the target's chat template"):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{where} is no valid Jinja: {error}: put a correct chat_template.jinja there") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, directory: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """chat_template.jinja, or else `chat_template` of tokenizer_config.json or chat_template.json; None without.

        Raises ConfigError, naming the file.
        """
        file = directory / "chat_template.jinja"
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), special_tokens, str(file))
        for file in (directory / "tokenizer_config.json", directory / "chat_template.json"):
            source = read_json(file).get("chat_template")
            if isinstance(source, list):  # several by name
                source = _default_of(source, file)
            if source:
                return cls(source, special_tokens, f"{file}: chat_template")
        return None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt up to where the assistant begins. Raises RequestError, in the template's own words."""
        try:
            return self._template.render(
                {
                    **self._special_tokens,
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": True,
                    **variables,
                    "messages": messages,
                }
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
            raise RequestError(f"the model's chat template refuses these messages: {error}", "messages") from error


def _default_of(templates: list[Any], file: Path) -> str:
    by_name = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    default = by_name.get("default")
    if not isinstance(default, str):
        raise ConfigError(
            f"{file}: chat_template names {', '.join(map(repr, by_name)) or 'nothing'} but no 'default': put the one "
            "to use beside it, as chat_template.jinja"
        )
    return default


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a training mask covers; for a prompt its body is all that matters."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which no template was trained with.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
