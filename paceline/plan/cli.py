"""`paceline plan FILE`: what a deploy file needs and gives, without weights and GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cluster.errors import ConfigError

WIDTH = 120  # where the output is no terminal


def plan(
    file: Annotated[Path, typer.Argument(help="deploy file, e.g. deploy/qwen397b.yaml", show_default=False)],
    gpu: Annotated[str | None, typer.Option(help="GPU type of the ranks; default: what the file asks Ray for")] = None,
    drafter_gpu: Annotated[str | None, typer.Option(help="GPU type of the drafters; default: as --gpu")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="which of deploy/architectures the target is, if its checkpoint is not here")
    ] = None,
    drafter_architecture: Annotated[str | None, typer.Option(help="the same for the drafter's checkpoint")] = None,
    steps: Annotated[Path | None, typer.Option(help="table of measured verify steps; default: the file's")] = None,
    drafts: Annotated[Path | None, typer.Option(help="table of measured drafts; default: the file's")] = None,
    acceptance: Annotated[float | None, typer.Option(help="tokens a step with whole blocks; default: 4")] = None,
    context: Annotated[int, typer.Option(min=1, help="tokens of context of a request")] = 4096,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="running requests of a verifier; may be repeated")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write everything to this file")] = None,
) -> None:
    """Ranks, bytes, capacities, link and drafters of FILE. Exit codes: 0 it fits, 1 it does not, 2 FILE cannot work."""
    from paceline.plan.document import Assumed, make_plan
    from paceline.plan.reading import Options, read_inputs
    from paceline.plan.show import show

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    try:
        inputs = read_inputs(file, Options(gpu, drafter_gpu, architecture, drafter_architecture, steps, drafts))
        made = make_plan(str(file), inputs, Assumed(acceptance, context, tuple(concurrency or ())))
        if json_file is not None:
            _write(json_file, made.as_json())
    except (ConfigError, ValueError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "red"), str(error)))
        raise typer.Exit(2) from error
    show(made, console)
    if not made.fits:
        raise typer.Exit(1)


def _write(path: Path, content: dict) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {path}: {error.strerror}") from error
