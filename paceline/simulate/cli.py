"""`paceline simulate FILE`: what a deploy file gives under load, in virtual time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cluster.errors import ConfigError

WIDTH = 120  # where the output is no terminal
CONCURRENCY = (1, 4, 16, 64)
WARM_UP = 0.1  # of the simulated time


def simulate(
    file: Annotated[Path, typer.Argument(help="deploy file, e.g. deploy/qwen397b.yaml", show_default=False)],
    steps: Annotated[Path | None, typer.Option(help="table of measured verify steps; default: the file's")] = None,
    drafts: Annotated[Path | None, typer.Option(help="table of measured drafts; default: the file's")] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="requests at once of each verifier; may be repeated")
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.001, help="requests a second over all verifiers instead; may be repeated"),
    ] = None,
    acceptance: Annotated[
        str | None,
        typer.Option(help='tokens a step with whole blocks ("4"), or chances that the first 1, 2, .. drafts are right'),
    ] = None,
    certainty: Annotated[
        float,
        typer.Option(min=0.5, max=0.99, help="how often the drafter knows which drafts are right; 0.5: it never does"),
    ] = 0.5,
    prompt: Annotated[int, typer.Option(min=1, help="tokens")] = 1024,
    output: Annotated[int, typer.Option(min=1, help="tokens, on average")] = 256,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=86400, help="of simulated time, of which the first tenth does not count")
    ] = 30,
    drafters: Annotated[list[int] | None, typer.Option(min=1, help="default: the file's; may be repeated")] = None,
    verifiers: Annotated[int | None, typer.Option(min=1, help="default: the file's")] = None,
    dies: Annotated[
        float | None, typer.Option("--drafter-dies", min=0, help="the first one, after so many seconds")
    ] = None,
    stalls: Annotated[float | None, typer.Option("--drafter-stalls", min=0, help="the first one, from then on")] = None,
    stalls_for: Annotated[float | None, typer.Option("--stalls-for", min=0, help="seconds; default: for good")] = None,
    slow: Annotated[
        float, typer.Option("--drafter-slow", min=1, help="the first one takes so many times as long")
    ] = 1.0,
    garbage: Annotated[bool, typer.Option("--drafter-garbage", help="all that the first one drafts is wrong")] = False,
    gpu: Annotated[str | None, typer.Option(help="as `paceline plan`")] = None,
    drafter_gpu: Annotated[str | None, typer.Option(help="as `paceline plan`")] = None,
    architecture: Annotated[str | None, typer.Option(help="as `paceline plan`")] = None,
    drafter_architecture: Annotated[str | None, typer.Option(help="as `paceline plan`")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write everything to this file")] = None,
) -> None:
    """Run FILE's scheduler, speculation control, links and drafters against simulated models: tokens a second and
    latencies, plain against drafted, for each load and number of drafters.

    \b
    At what concurrency does drafting stop paying, and how many drafters do two verifiers want?
      paceline simulate deploy/qwen397b.yaml --verifiers 2 --drafters 1 --drafters 2 --concurrency 16 --concurrency 64
    With what was measured on the machine that will serve:
      paceline simulate deploy/qwen3-8b.yaml --steps steps/qwen3-8b.json --drafts drafts/qwen3-8b-dflash.json
    What does a drafter's death cost?
      paceline simulate deploy/qwen397b.yaml --concurrency 16 --drafter-dies 10
    """
    from paceline.plan.reading import Options
    from paceline.progress import bar
    from paceline.simulate.drafters import Fault
    from paceline.simulate.run import Load
    from paceline.simulate.setup import check_lengths, describe, survival_of
    from paceline.simulate.show import show
    from paceline.simulate.sweep import loads_of, parts, sweep

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    never = float("inf")
    fault = Fault(
        never if dies is None else dies,
        never if stalls is None else stalls,
        never if stalls_for is None else stalls_for,
        slow,
        garbage,
    )
    try:
        described = describe(file, Options(gpu, drafter_gpu, architecture, drafter_architecture, steps, drafts))
        check_lengths(described.setup, prompt, output)
        survival = survival_of(acceptance, described.block_size)
        base = Load(None, None, prompt, output, survival, seconds, WARM_UP * seconds, certainty, seed)
        slots = described.setup.limits.slots
        levels = concurrency or ([] if rate else [*(count for count in CONCURRENCY if count < slots), slots])
        loads = loads_of(base, levels, rate or ())
        counts, many = sorted(set(drafters or [described.drafters])), verifiers or described.verifiers
        with bar("simulated", parts(loads, counts)) as advance:
            found = list(sweep(described.setup, loads, counts, many, [fault], advance))
        if json_file is not None:
            drafting = described.setup.drafting
            titles = {"steps": described.setup.target.title, "drafts": drafting.times.title if drafting else None}
            rows = [level.as_json() for level in found]
            _write(json_file, {"file": str(file), "verifiers": many, **titles, "levels": rows})
    except (ConfigError, ValueError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "red"), str(error)))
        raise typer.Exit(2) from error
    show(found, described, many, [fault], console)


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {path}: {error.strerror}") from error
