"""Tables of docs/deploy-file.md, made from the models that read a deploy file.

python -m paceline.docs            # rewrite the generated part
python -m paceline.docs --check    # exit code 1 if it is out of date
"""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

PAGE = Path(__file__).resolve().parent.parent / "docs" / "deploy-file.md"
BEGIN = "<!-- tables: made by `python -m paceline.docs`, not by hand -->"
END = "<!-- end of tables -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="do not write; exit code 1 if the page is out of date")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = renewed(before)
    if check:
        sys.exit(0 if before == after else f"{PAGE} is out of date: run `python -m paceline.docs`")
    PAGE.write_text(after, encoding="utf-8")


def renewed(page: str) -> str:
    """The page with fresh tables between its two markers. Raises ValueError if a marker is missing."""
    from deploy.config import Application

    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r} once each")
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    return "\n".join([f"{head}{BEGIN}", "", *tables(Application), f"{END}{tail}"])


def tables(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Markdown: a table of a model's own keys, then one for each section below it."""
    sections = []
    yield f"### {f'`{path}`' if path else '`args`'}"
    yield ""
    for paragraph in (model.__doc__ or "").strip().split("\n\n"):
        yield " ".join(paragraph.split())
        yield ""
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        nested = _model_of(field.annotation)
        if nested is not None:
            sections.append((nested, f"{path}.{name}" if path else name))
        cells = (f"`{name}`", _values(field, sections), _default(field), _meaning(field))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for nested, where in sections:
        yield from tables(nested, where)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _values(field: FieldInfo, sections: list[tuple[type[BaseModel], str]]) -> str:
    if _model_of(field.annotation) is not None:
        return f"section, see `{sections[-1][1]}`"
    return _type(field.annotation) + "".join(f", {bound}" for bound in _bounds(field))


def _type(annotation: Any) -> str:
    if _is_union(annotation):
        return " or ".join(_type(kind) for kind in typing.get_args(annotation))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if annotation is type(None):
        return "`null`"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    plain = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    return plain.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _bounds(field: FieldInfo) -> Iterator[str]:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for part in field.metadata:
        for name, sign in signs.items():
            if (value := getattr(part, name, None)) is not None:
                yield f"{sign} {value}"
        if getattr(part, "min_length", None):
            yield "not empty"


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("None =", "`null` =")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined or isinstance(field.default, BaseModel):
        return ""
    if field.default in ("", ()):
        return "empty"
    return f"`{'null' if field.default is None else field.default}`"


if __name__ == "__main__":
    main()
