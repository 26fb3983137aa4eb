"""Prints a sweep as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from paceline.simulate.drafters import Fault
from paceline.simulate.run import Load
from paceline.simulate.setup import Described
from paceline.simulate.sweep import Level, conclusions


def show(
    levels: Sequence[Level], described: Described, verifiers: int, faults: Sequence[Fault], console: Console
) -> None:
    load = levels[0].load
    many = f"{verifiers} verifier{'s' * (verifiers > 1)}"
    console.print(f"[bold]{described.model_name}[/bold] ({described.file}), {many}", highlight=False)
    console.print(_speed(levels, load))
    console.print(_drafting(levels, load))
    for line in [*conclusions(levels), *_assumptions(described, load, faults)]:
        console.print(f"  {line}", highlight=False)
    if any(level.plain.refused or level.drafted.refused for level in levels):
        worst = max(max(level.plain.refused, level.drafted.refused) for level in levels)
        console.print(
            f"[cyan]note:[/cyan] up to {worst} requests of a run were refused (verifier.max_waiting): too high a load"
        )


def _speed(levels: Sequence[Level], load: Load) -> Table:
    table = _table("Throughput and latency, plain against drafted (ms; p50 / p95)", load)
    for heading in ("plain tok/s", "drafted", "speed-up", "token, plain", "drafted", "first token, plain", "drafted"):
        table.add_column(heading, justify="right")
    for level in levels:
        plain, drafted = level.plain, level.drafted
        table.add_row(
            *(level.name, str(level.drafters), f"{plain.tokens_per_s:,.0f}", f"{drafted.tokens_per_s:,.0f}"),
            f"{level.speedup:.2f}",
            _pair(plain.token_p50, plain.token_p95),
            _pair(drafted.token_p50, drafted.token_p95),
            _pair(plain.first_p50, plain.first_p95),
            _pair(drafted.first_p50, drafted.first_p95),
        )
    return table


def _drafting(levels: Sequence[Level], load: Load) -> Table:
    table = _table("Drafting", load)
    for heading in ("running", "steps drafted", "tau", "waste", "drafters busy", "asks", "late", "missed", "preempted"):
        table.add_column(heading, justify="right")
    for level in levels:
        figures = level.drafted
        table.add_row(
            *(level.name, str(level.drafters), f"{figures.running:.1f}", f"{figures.drafted_steps:.0%}"),
            "-" if figures.tau is None else f"{figures.tau:.2f}",
            "-" if figures.waste is None else f"{figures.waste:.0%}",
            f"{figures.busy:.0%}",
            *(f"{count:,}" for count in (figures.asks, figures.late, figures.missed, figures.preemptions)),
        )
    return table


def _table(title: str, load: Load) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("requests" if load.rate is None else "arrivals")
    table.add_column("drafters", justify="right")
    return table


def _pair(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low * 1e3:.1f} / {high * 1e3:.1f}"


def _assumptions(described: Described, load: Load, faults: Sequence[Fault]) -> list[str]:
    drafting = described.setup.drafting
    assert drafting is not None, "described is what drafts"
    chances = ", ".join(f"{chance:.2f}" for chance in load.survival[:4])
    lines = [
        f"steps: {described.setup.target.title}",
        f"drafts: {drafting.times.title}",
        f"{load.prompt:,} tokens of prompt, {load.output:,} of output, {load.seconds:g} s of which the first "
        f"{load.warm_up_s:g} s do not count, seed {load.seed}; the first 1, 2, .. of a block's "
        f"{described.block_size - 1} drafts are all right with {chances}{', ..' * (len(load.survival) > 4)}",
    ]
    for number, fault in enumerate(faults):
        if said := fault.describe():
            lines.append(f"drafter {number + 1} {said}")
    return lines
