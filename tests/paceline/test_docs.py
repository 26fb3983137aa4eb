from typing import Literal

import pytest
from pydantic import BaseModel, Field

from paceline import docs


class Inner(BaseModel):
    """What is
    inside.

    mode: how.
    """

    mode: Literal["a", "b"] = "a"
    limit: int | None = Field(None, ge=0, lt=9, description="None = off")


class Outer(BaseModel):
    """Both."""

    name: str = Field(min_length=1, description="a | b")
    inner: Inner = Inner()


def test_every_field_has_a_row_with_values_default_and_meaning():
    lines = list(docs.tables(Outer))
    assert "| `name` | text, not empty | required | a \\| b |" in lines
    assert "| `inner` | section, see `inner` |  |  |" in lines
    assert "| `mode` | `a`, `b` | `a` |  |" in lines
    assert "| `limit` | whole number or `null`, ≥ 0, < 9 | `null` | `null` = off |" in lines


def test_a_section_begins_with_what_its_model_says_of_itself():
    lines = list(docs.tables(Outer))
    first = lines.index("### `inner`")
    assert lines[first + 1 : first + 6] == ["", "What is inside.", "", "mode: how.", ""]


def test_the_page_of_the_deploy_file_is_up_to_date():
    page = docs.PAGE.read_text(encoding="utf-8")
    assert docs.renewed(page) == page, "run `python -m paceline.docs`"


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="once each"):
        docs.renewed("no markers")
