"""`paceline bench`: the options of its commands. What they do is imported when they run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.errors import PacelineError

app = typer.Typer(no_args_is_help=True, help="Measure engines and servers.")

CONCURRENCY = (1, 8)
FILE_WIDTH = 120

Concurrency = Annotated[
    list[int] | None, typer.Option("--concurrency", min=1, help="requests at once; may be repeated; default: 1 and 8")
]
Prompts = Annotated[
    Path | None, typer.Option(help='JSON lines of {"turns": [..]} or {"prompt": ..}; default: 32 beginnings of code')
]
Limit = Annotated[int | None, typer.Option(min=1, help="take only the first prompts")]
MaxTokens = Annotated[int, typer.Option(min=1, help="new tokens a prompt")]
Temperature = Annotated[float, typer.Option(min=0, help="0 = greedy")]
Json = Annotated[Path | None, typer.Option("--json", help="write all figures here")]
Plot = Annotated[Path | None, typer.Option(help="write a plot here (.png, .svg, .pdf)")]


@app.command()
def engine(
    target: Annotated[Path, typer.Option(help="target checkpoint directory")] = Path("models/tiny/target"),
    drafter: Annotated[Path, typer.Option(help="DFlash checkpoint directory")] = Path("models/tiny/drafter"),
    prompts: Prompts = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    concurrency: Concurrency = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="ranks of the target")] = 1,
    temperature: Temperature = 0.0,
    repeat: Annotated[int, typer.Option(min=1, help="interleaved repeats; medians are shown")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    kv_dtype: Annotated[str, typer.Option(help="of the engines' KV caches, as verifier.kv_dtype")] = "auto",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="plain decoding in that mode as well")] = False,
    resting: Annotated[bool, typer.Option("--resting", help="plain decoding with an idle drafter as well")] = False,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Compare decoders on this machine, without Ray: plain, drafted from another process, drafted in the same process,
    transformers' generate and continuous batching and, for Qwen3 targets, the published DFlash loop. Same weights, same
    prompts, one run."""
    from paceline.bench.engine import EngineOptions, bench

    options = EngineOptions(
        target=target,
        drafter=drafter,
        prompts=prompts,
        limit=limit,
        max_tokens=max_tokens,
        concurrency=tuple(concurrency or CONCURRENCY),
        tensor_parallel=tensor_parallel,
        temperature=temperature,
        repeats=repeat,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        deterministic=deterministic,
        resting=resting,
    )
    try:
        result = bench(options)
    except PacelineError as error:
        _fail(error)
    result.show(_console())
    if json is not None:
        result.write_json(json)
    if plot is not None:
        result.plot(plot)


@app.command()
def server(
    url: Annotated[str, typer.Option(help="of an OpenAI-compatible server, e.g. http://127.0.0.1:8000")],
    model: Annotated[str | None, typer.Option(help="default: the first that the server lists")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="sent as a bearer token")] = None,
    prompts: Prompts = None,
    limit: Limit = None,
    max_tokens: MaxTokens = 128,
    concurrency: Concurrency = None,
    temperature: Temperature = 0.0,
    requests: Annotated[int | None, typer.Option(min=1, help="of each concurrency; default: four a client")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="seconds that a request may take")] = 300.0,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Measure a running server over HTTP: tokens/s, time to first token, inter-token latency, errors."""
    from paceline.bench import prompts as prompt_files
    from paceline.bench import server_report
    from paceline.bench.server import ServerOptions, measure
    from paceline.progress import bar

    options = ServerOptions(
        url, model, api_key, tuple(concurrency or CONCURRENCY), max_tokens, temperature, requests, timeout
    )
    try:
        chosen = prompt_files.read(prompts or prompt_files.SHIPPED, limit)
        total = sum(options.requests_at(level, len(chosen)) for level in options.concurrency)
        with bar("requests", total) as advance:
            name, levels = asyncio.run(measure(options, chosen, advance))
    except PacelineError as error:
        _fail(error)
    title = f"{name} at {url}, {max_tokens} tokens, temperature {temperature:g}"
    _console().print(server_report.table(levels, title))
    if json is not None:
        settings = {"url": url, "model": name, "max_tokens": max_tokens, "temperature": temperature}
        server_report.write_json(json, levels, {**settings, "prompts": str(prompts or prompt_files.SHIPPED)})
    if plot is not None:
        server_report.plot(plot, levels, title)
    if all(not level.tokens for level in levels):
        raise typer.Exit(1)


@app.command()
def host(
    requests: Annotated[int, typer.Option(min=1, help="decoding at once")] = 256,
    drafts: Annotated[int, typer.Option(min=1, help="of a block, in the drafted row")] = 7,
    right: Annotated[int, typer.Option(min=0, help="of them that stand")] = 3,
    steps: Annotated[int, typer.Option(min=4, help="of a run")] = 200,
    repeat: Annotated[int, typer.Option(min=1, help="interleaved repeats; medians are shown")] = 3,
    json: Json = None,
) -> None:
    """Measure what a step costs beside the model: the engine runs with a null model and a null drafter,
    behind no link and behind one over tcp."""
    from paceline.bench.host import NAMES, HostOptions, measure, table, write_json
    from paceline.bench.machine import describe
    from paceline.progress import bar

    machine = describe()
    try:
        with bar("runs", len(NAMES) * repeat) as advance:
            rows = measure(HostOptions(requests, drafts, right, steps, repeat), advance)
    except PacelineError as error:
        _fail(error)
    _console().print(table(rows))
    if json is not None:
        write_json(json, rows, machine)


@app.command()
def steps(
    out: Annotated[Path, typer.Argument(help="folder for the tables")],
    target: Annotated[Path, typer.Option(help="target checkpoint directory")] = Path("models/tiny/target"),
    drafter: Annotated[Path, typer.Option(help="DFlash checkpoint directory")] = Path("models/tiny/drafter"),
    concurrency: Concurrency = None,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="tokens of a request in a step; default: 1, 2, 4, .. a block")
    ] = None,
    context: Annotated[list[int] | None, typer.Option(min=4, help="tokens of prompt; default: 128")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="ranks of the target")] = 1,
    count: Annotated[int, typer.Option("--steps", min=4, help="of each measurement")] = 24,
    repeat: Annotated[int, typer.Option(min=1, help="interleaved repeats; medians are written")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
) -> None:
    """Time the steps and drafts of a running pair by requests, rows and context, and write the tables that
    `paceline simulate` and a verifier's `speculation.step_table` read."""
    from modeling.dflash_config import DFlashConfig
    from paceline.bench.steps import StepsOptions, measure, write
    from paceline.progress import bar

    options = StepsOptions(
        target=target,
        drafter=drafter,
        concurrency=tuple(concurrency or CONCURRENCY),
        rows=tuple(rows or ()),
        contexts=tuple(context or (128,)),
        tensor_parallel=tensor_parallel,
        device=device,
        dtype=dtype,
        steps=count,
        repeats=repeat,
    )
    try:
        total = repeat * len(options.sizes(DFlashConfig.load(drafter).block_size))
        with bar("measurements", total) as advance:
            tables = measure(options, advance)
    except PacelineError as error:
        _fail(error)
    for path in write(out, tables):
        typer.echo(path)


@app.command()
def cache(
    target: Annotated[Path, typer.Option(help="target checkpoint directory")] = Path("models/tiny/target"),
    drafter: Annotated[Path, typer.Option(help="DFlash checkpoint directory")] = Path("models/tiny/drafter"),
    conversations: Annotated[int, typer.Option(min=1, help="one after the other")] = 4,
    turns: Annotated[int, typer.Option(min=2, help="of a conversation")] = 4,
    max_tokens: MaxTokens = 48,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    json: Json = None,
) -> None:
    """Measure conversations with and without the prefix cache: tokens found, time to first token, acceptance length."""
    from paceline.bench.cache import CacheOptions, measure, table
    from paceline.progress import bar

    options = CacheOptions(target, drafter, conversations, turns, max_tokens, dtype, device)
    try:
        with bar("turns", 2 * conversations * turns) as advance:
            rows = measure(options, advance)
    except PacelineError as error:
        _fail(error)
    _console().print(table(rows))
    _write_rows(json, rows)


@app.command()
def commit(
    rows: Annotated[int, typer.Option(min=1, help="requests in the verify")] = 8,
    block: Annotated[int, typer.Option(min=1, help="tokens of each")] = 8,
    repeat: Annotated[int, typer.Option(min=1, help="interleaved repeats; medians are shown")] = 15,
    json: Json = None,
) -> None:
    """Measure the commit of a verified block into recurrent state: replay against a snapshot of every position."""
    from paceline.bench.commit import LARGE, TINY, measure, table

    try:
        found = [row for shape in (TINY, LARGE) for row in measure(shape, rows, block, repeat)]
    except PacelineError as error:
        _fail(error)
    _console().print(table(found))
    _write_rows(json, found)


def _write_rows(path: Path | None, rows: Sequence[Any]) -> None:
    """Dataclasses, with the machine they were measured on."""
    if path is None:
        return
    import json
    from dataclasses import asdict

    from paceline.bench.machine import describe

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _console() -> Console:
    """As wide as the terminal; wide enough for any table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def _fail(error: PacelineError) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False, style="red")
    raise typer.Exit(2) from error
