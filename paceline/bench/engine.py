"""`paceline bench engine`: the decoders side by side, on the same weights and prompts, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from paceline.bench import continuous, engine_rows, published, report
from paceline.bench import prompts as prompt_files
from paceline.bench.agreement import Agreement, compare
from paceline.bench.continuous import ContinuousBatching
from paceline.bench.engine_decoder import EngineDecoder
from paceline.bench.engine_rows import PLAIN, EngineSetup
from paceline.bench.errors import BenchError
from paceline.bench.figures import Row, Skipped, row
from paceline.bench.interleave import measure
from paceline.bench.machine import describe
from paceline.bench.published import PublishedLoop
from paceline.bench.reference import Reference, load_reference
from paceline.bench.runs import Decoder, Run
from paceline.progress import bar


@dataclass(frozen=True)
class EngineOptions:
    """What the command line says. prompts None: the shipped ones. dtype: of target, drafter and link alike.

    deterministic: beside plain decoding, the same in deterministic mode. resting: the same, ready to draft.
    """

    target: Path
    drafter: Path
    prompts: Path | None
    limit: int | None
    max_tokens: int
    concurrency: tuple[int, ...]
    tensor_parallel: int
    temperature: float
    repeats: int
    device: str
    dtype: str
    kv_dtype: str = "auto"
    deterministic: bool = False
    resting: bool = False


@dataclass(frozen=True)
class Result:
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    options: EngineOptions
    machine: dict[str, Any]
    prompts: int
    left_out: int

    @property
    def title(self) -> str:
        options = self.options
        left_out = f" ({self.left_out} too long for the context left out)" if self.left_out else ""
        dtype = options.dtype if options.kv_dtype == "auto" else f"{options.dtype} with {options.kv_dtype} KV"
        return (
            f"{options.target}, TP {options.tensor_parallel}, {dtype} on {options.device}; {self.prompts} "
            f"prompts{left_out}, {options.max_tokens} tokens, temperature {options.temperature:g}, "
            f"median of {options.repeats}"
        )

    def show(self, console: Console) -> None:
        console.print(report.table(self.rows, self.skipped, self.title))

    def write_json(self, path: Path) -> None:
        report.write_json(path, self.rows, self.skipped, asdict(self.options), self.machine)

    def plot(self, path: Path) -> None:
        report.plot(path, self.rows, self.title)


def bench(options: EngineOptions) -> Result:
    """Start all decoders, measure them in turns, stop them. Raises BenchError or another PacelineError."""
    machine = describe()
    prompts = prompt_files.read(options.prompts or prompt_files.SHIPPED, options.limit)
    if not (options.drafter / "config.json").is_file():
        raise BenchError(f"--drafter {options.drafter} holds no config.json: give a DFlash checkpoint directory")
    with ExitStack() as stack:
        reference = load_reference(
            options.target, options.dtype, options.device, options.tensor_parallel, options.temperature
        )
        rendered, left_out = prompt_files.fit(prompts, reference.tokenizer, options.max_tokens, reference.max_context)
        setup = EngineSetup(
            target=options.target,
            drafter=options.drafter,
            tensor_parallel=options.tensor_parallel,
            dtype=options.dtype,
            kv_dtype=options.kv_dtype,
            device=options.device,
            requests=max(options.concurrency),
            context=max(map(len, rendered)) + options.max_tokens,
            temperature=options.temperature,
            stop_token_ids=reference.stop_token_ids,
        )
        starts = [engine_rows.plain, engine_rows.disaggregated, engine_rows.colocated]
        if options.deterministic:
            starts.insert(1, engine_rows.deterministic)
        if options.resting:
            starts.insert(1, engine_rows.resting)
        decoders: list[Decoder] = []
        with bar("engines", len(starts)) as advance:
            for start in starts:
                decoders.append(start(setup, stack))
                advance(1, decoders[-1].name)
        decoders.append(reference)
        skipped: list[Skipped] = []
        if reason := continuous.why_not(reference.config):
            skipped.append(Skipped(ContinuousBatching.name, reason))
        else:
            decoders.append(ContinuousBatching(reference, options.temperature))
        if reason := published.why_not(reference.model_type):
            skipped.append(Skipped(PublishedLoop.name, reason))
        else:
            decoders.append(
                PublishedLoop(reference, options.drafter, options.dtype, options.device, options.temperature)
            )
        rows: list[Row] = []
        with bar("runs", len(options.concurrency) * options.repeats * len(decoders)) as advance:
            for level in options.concurrency:
                runs = measure(decoders, rendered, level, options.max_tokens, options.repeats, advance)
                rows += level_rows(decoders, rendered, level, runs, options, reference)
    return Result(tuple(rows), tuple(skipped), options, machine, len(rendered), left_out)


def level_rows(
    decoders: list[Decoder],
    prompts: list[tuple[int, ...]],
    level: int,
    runs: dict[str, list[Run]],
    options: EngineOptions,
    reference: Reference,
) -> Iterator[Row]:
    for decoder in decoders:
        ours = runs[decoder.name]
        agreement = agreed(decoder, prompts, ours, runs, options, reference)
        yield row(decoder.name, level, ours, runs[PLAIN], agreement, decoder.note)


def agreed(
    decoder: Decoder,
    prompts: list[tuple[int, ...]],
    ours: list[Run],
    runs: dict[str, list[Run]],
    options: EngineOptions,
    reference: Reference,
) -> Agreement | None:
    """Greedy text is compared with transformers', sampled text among the engine's own rows (their seeds are equal)."""
    texts = [run.texts for run in ours]
    if options.temperature == 0:
        return compare(prompts, runs[reference.name][0].texts, texts, reference.gaps)
    if isinstance(decoder, EngineDecoder):
        return compare(prompts, runs[PLAIN][0].texts, texts, None)
    return None
