"""`paceline replay`: a flight record, run again offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.errors import PacelineError

TIE = 1e-4  # logits so close may fall either way on another machine


def replay(
    file: Annotated[Path, typer.Argument(help="what a flight recorder wrote when an engine crashed")],
    target: Annotated[Path | None, typer.Option(help="checkpoint directory; default: where the record says")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="default: the record's")] = None,
    threads: Annotated[int, typer.Option(min=1, help="torch threads on CPU")] = 1,
    show: Annotated[int, typer.Option(min=0, help="differences to list")] = 10,
) -> None:
    """Run an engine's last steps again, in the same batches, on one rank, and compare every token with the record.

    Ends with 0 if all tokens are the record's (but for ties of logits within 1e-4), with 1 if some differ or a step
    fails, with 2 if the record cannot be run.
    """
    import torch

    from modeling.errors import CheckpointError
    from modeling.target_config import target_fingerprint
    from paceline.progress import bar
    from verifier_service.grammar.compiler import GrammarCompiler
    from verifier_service.model.runner import TargetRunner
    from verifier_service.recorder import read_flight
    from verifier_service.replay import Difference, Replay, sizes

    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(threads)
    try:
        flight = read_flight(file)
        directory = target or Path(flight.target.directory)
        console.print(
            f"{file}: {len(flight.steps)} steps of {len(flight.requests)} requests on engine {flight.engine_id}, "
            f"which ended with: {flight.reason}",
            markup=False,
        )
        if target_fingerprint(directory) != flight.target.fingerprint:
            console.print(f"warning: {directory} is not the checkpoint of the record; tokens may differ", markup=False)
        slots, blocks, context = sizes(flight)
        runner = TargetRunner(
            directory,
            num_blocks=max(blocks, 1),
            block_tokens=flight.target.block_tokens,
            num_slots=max(slots, 1),
            dtype=getattr(torch, dtype or flight.target.dtype),
            device=device,
            kv_dtype=flight.target.kv_dtype,
            max_context=context,
            deterministic=flight.target.deterministic,
        )
        grammars = None
        if any(one.request.grammar is not None for one in flight.requests):
            grammars = GrammarCompiler.load(directory, runner.shape.vocabulary)
        compared, differences, failed = 0, list[Difference](), ""
        with bar("steps", len(flight.steps)) as advance:
            for step in Replay(flight, runner, grammars).steps():
                compared += step.compared
                differences += step.differences
                if step.error is not None:
                    failed = f"step {step.step} fails here too: {step.error}"
                advance(1, f"step {step.step}")
    except (PacelineError, CheckpointError, AttributeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    ties = [one for one in differences if one.recorded >= 0 and one.gap <= TIE]
    real = [one for one in differences if one not in ties]
    console.print(f"{compared} tokens compared, {len(real)} differ, {len(ties)} ties")
    for one in real[:show]:
        console.print(
            f"step {one.step}, request {one.request_id!r} choice {one.choice}, position {one.position}: recorded "
            f"{one.recorded}, replayed {one.replayed} (logit gap {one.gap:.3g})",
            markup=False,
        )
    if failed:
        console.print(failed, markup=False)
    if real or failed:
        raise typer.Exit(1)
