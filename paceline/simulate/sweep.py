"""Plain and drafted runs at several loads, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from paceline.simulate.drafters import Fault
from paceline.simulate.run import Figures, Load, Setup, simulate

PAYS = 1.03  # times plain decoding: less is within what the control itself costs
ENOUGH = 0.9  # of the throughput that the most drafters give


@dataclass(frozen=True)
class Level:
    """One load with one number of drafters."""

    load: Load
    drafters: int
    plain: Figures
    drafted: Figures

    @property
    def speedup(self) -> float:
        return self.drafted.tokens_per_s / self.plain.tokens_per_s if self.plain.tokens_per_s else 1.0

    @property
    def name(self) -> str:
        """Of the load, for people."""
        return f"{self.load.rate:g}/s" if self.load.rate is not None else str(self.load.concurrency)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup}


def sweep(
    setup: Setup,
    loads: Sequence[Load],
    drafters: Sequence[int],
    verifiers: int,
    faults: Sequence[Fault],
    advance: Callable[[int, str], None],
) -> Iterator[Level]:
    """A level for each load and number of drafters. advance: told of hundredths of runs, as progress bars want it."""
    for load in loads:
        plain = simulate(setup, load, drafters=0, verifiers=verifiers, advance=partial(advance, 1, "plain"))
        for count in drafters:
            note = f"{count} drafter{'s' * (count > 1)}"
            drafted = simulate(
                setup,
                load,
                drafters=count,
                verifiers=verifiers,
                faults=faults,
                advance=partial(advance, 1, note),
            )
            yield Level(load, count, plain, drafted)


def parts(loads: Sequence[Load], drafters: Sequence[int]) -> int:
    """How often `sweep` advances."""
    return 100 * len(loads) * (1 + len(drafters))


def conclusions(levels: Sequence[Level]) -> list[str]:
    """What a reader wants to know: where drafting pays, and how many drafters are enough."""
    most = max(level.drafters for level in levels)
    largest = [level for level in levels if level.drafters == most]
    paying = [level for level in largest if level.speedup >= PAYS]
    with_most = f"with {most} drafter{'s' * (most > 1)}"
    if not paying:
        lines = [f"drafting pays at none of these loads {with_most}"]
    elif len(paying) == len(largest):
        lines = [f"drafting pays at all of these loads {with_most}"]
    else:
        lines = [f"drafting pays {with_most} at {', '.join(level.name for level in paying)}"]
    if len({level.drafters for level in levels}) > 1:
        enough = (f"{_enough(levels, level)} at {level.name}" for level in paying)
        lines.append(f"drafters that give {ENOUGH:.0%} of what {most} give: {', '.join(enough) or 'none are needed'}")
    return lines


def _enough(levels: Sequence[Level], best: Level) -> int:
    same = sorted((level for level in levels if level.load == best.load), key=lambda level: level.drafters)
    wanted = ENOUGH * best.drafted.tokens_per_s
    return next(level.drafters for level in same if level.drafted.tokens_per_s >= wanted)


def loads_of(base: Load, concurrency: Sequence[int], rates: Sequence[float]) -> list[Load]:
    """One for each, on the pattern of `base`."""
    return [
        *(replace(base, concurrency=count, rate=None) for count in concurrency),
        *(replace(base, concurrency=None, rate=rate) for rate in rates),
    ]
