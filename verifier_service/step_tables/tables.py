"""Reads step tables and draft tables: JSON, checked before anything is priced with it. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import ConfigError
from verifier_service.step_tables.grid import Grid, Point, smallest

MEASURE = {
    "verify": "python -m tests.gpu.measure_steps (or paceline bench steps)",
    "draft": "python -m tests.gpu.measure_draft (or paceline bench steps)",
}
MOST_COUNT = 1 << 31  # of anything that is counted here
MOST_SECONDS = 3600.0  # of a step
MOST_POINTS = 50_000  # that the axes of a table span, measured or not: read in under a second

Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS, allow_inf_nan=False)]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)  # what else was measured is for people


class VerifyStep(_Read):
    """`requests` verify rows of `rows` tokens each, bonus token and drafts, the last at position context - 1."""

    requests: Count
    rows: Count
    context: Count
    seconds: Seconds


class DraftStep(_Read):
    """`contexts` blocks of `rows` rows each, the bonus token's included, over `window` tokens of context KV each.

    inject_seconds: of a few new tokens' context KV for each of them, which comes with every step.
    """

    contexts: Count
    rows: int = Field(ge=2, le=MOST_COUNT)
    window: Count
    seconds: Seconds
    inject_seconds: float = Field(0.0, ge=0, le=MOST_SECONDS, allow_inf_nan=False)


class _Table(_Read):
    """shape: what was measured; device: on what. layers: of the model that were on the device."""

    format: Literal[1]
    shape: str = Field(min_length=1)
    device: str = "an unnamed device"
    date: str = ""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.shape} on {self.device}{f', {self.date}' if self.date else ''}"


class VerifyTable(_Table):
    """Verify steps of a target. ranks: of so many the first was measured, without what it would hear of the others.

    clock "device": steps in a run of them, one launched behind the other; "engine": as an engine's control sees them,
    all ranks and the engine's own work included.
    """

    clock: Literal["device", "engine"] = "device"
    ranks: int = Field(1, ge=1, le=MOST_COUNT)
    layers: Count
    verify: tuple[VerifyStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _points_make_a_grid(self) -> VerifyTable:
        _check_points("verify", ("requests", "rows", "context"), self._points)
        return self

    def step_s(self, requests: float, rows: float, context: float) -> float:
        """Seconds of a step of `requests` rows with `rows` tokens each, on average, and contexts of `context`."""
        return self._grid.at(requests, rows, context)

    @property
    def shortest_context(self) -> int:
        return self._grid.axes[2][0]

    def token_s(self, context: float) -> float:
        """Seconds of a further token in the largest step that was measured: what prefill beside it costs a token."""
        requests, rows = self._grid.axes[0][-1], self._grid.axes[1][-1]
        least = self.step_s(1, 1, context)
        return max(0.0, self.step_s(requests, rows, context) - least) / max(1, requests * rows - 1)

    @property
    def _points(self) -> dict[Point, float]:
        return {(step.requests, step.rows, step.context): step.seconds for step in self.verify}

    @cached_property
    def _grid(self) -> Grid:
        return Grid(self._points)


class DraftTable(_Table):
    """Draft steps of a drafter. clock "device": of its forward, numbers in to numbers out; "link": as a verifier waits
    for it, the link included.
    """

    clock: Literal["device", "link"] = "device"
    block_size: int = Field(ge=2, le=MOST_COUNT)
    draft: tuple[DraftStep, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _points_make_a_grid(self) -> DraftTable:
        _check_points("draft", ("contexts", "rows", "window"), self._points)
        return self

    def check_block(self, block_size: int, name: str) -> None:
        """Raises ConfigError if it is another drafter's. name: of the table."""
        if self.block_size != block_size:
            raise ConfigError(
                f"{name}: block_size is {self.block_size}, the drafter's is {block_size}: give the table of that one"
            )

    @property
    def shortest_window(self) -> int:
        return self._grid.axes[2][0]

    def draft_s(self, contexts: float, rows: float, window: float) -> float:
        """Seconds of one forward for `contexts` blocks, what was committed since the last taken in before."""
        return self._grid.at(contexts, rows, window)

    @property
    def _points(self) -> dict[Point, float]:
        return {(step.contexts, step.rows, step.window): step.seconds + step.inject_seconds for step in self.draft}

    @cached_property
    def _grid(self) -> Grid:
        return Grid(self._points)


def read_verify_table(path: Path) -> VerifyTable:
    """Raises ConfigError: names the file, the field, its value and the cure."""
    return _read(path, VerifyTable, "verify", "draft")


def read_draft_table(path: Path) -> DraftTable:
    """Raises ConfigError: names the file, the field, its value and the cure."""
    return _read(path, DraftTable, "draft", "verify")


_Kind = TypeVar("_Kind", bound=_Table)


def _read(path: Path, kind: type[_Kind], wanted: str, other: str) -> _Kind:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}: {MEASURE[wanted]} writes such a table") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): {MEASURE[wanted]} writes such a table") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold an object with the key {wanted!r}; see deploy/steps/README.md")
    if wanted not in raw and other in raw:
        raise ConfigError(f"{path} holds {other!r} and no {wanted!r}: it is the other kind of table")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"{path}: {_explained(problem)}" for problem in error.errors())
        raise ConfigError(f"{problems}\nmeasure it again ({MEASURE[wanted]}), or see deploy/steps/README.md") from error


def _explained(problem: Mapping[str, Any]) -> str:
    where = ".".join(map(str, problem["loc"]))
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in ("missing", "value_error") or not where:
        return f"{where}: {message}" if where else message
    return f"{where} is {problem['input']!r}: {message}"


def _check_points(key: str, names: Sequence[str], points: Mapping[Point, float]) -> None:
    spanned = math.prod(len(set(values)) for values in zip(*points))
    if spanned > MOST_POINTS:
        raise ValueError(
            f"{key} has so many different values of {', '.join(names)} that they span {spanned} steps, more than "
            f"{MOST_POINTS}: measure steps that share their values"
        )
    least = smallest(points)
    if least not in points:
        shown = ", ".join(f"{name} {value}" for name, value in zip(names, least))
        raise ValueError(f"{key} lacks the smallest step of all, {shown}: everything else is read relative to it")
