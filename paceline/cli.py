"""The `paceline` command. Subcommands live in their own modules, imported only when they are called for."""

from __future__ import annotations

import importlib
import sys

import typer

# name -> (module, its typer app, help). `--help` shows them without importing any.
COMMANDS = {
    "serve": ("paceline.serve", "Serve a deploy file on this machine or on a Ray cluster."),
    "plan": ("paceline.plan.cli", "Say what a deploy file needs and gives, without weights and GPUs."),
    "simulate": ("paceline.simulate.cli", "Run a deploy file under load in virtual time, without weights and GPUs."),
    "bench": ("paceline.bench.cli", "Measure engines and servers."),
    "replay": ("paceline.replay", "Run an engine's last steps before a crash again."),
    "train": ("paceline.train", "Train drafters."),
}


def main() -> None:
    wanted = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Serve large language models with disaggregated speculative decoding.",
    )
    for name, (module, summary) in COMMANDS.items():
        if name == wanted:
            _add(app, name, module, summary)
        else:
            app.command(name, help=summary)(_absent)
    app(prog_name="paceline")


def _add(app: typer.Typer, name: str, module: str, summary: str) -> None:
    commands = importlib.import_module(module)
    group = getattr(commands, "app", None)
    if group is not None:
        app.add_typer(group, name=name, help=summary)
    else:
        app.command(name, short_help=summary)(getattr(commands, name))


def _absent() -> None:
    """Stands for a subcommand in the list of `--help`; the one that is called is imported instead."""


if __name__ == "__main__":
    main()
