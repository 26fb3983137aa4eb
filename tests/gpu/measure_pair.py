"""Tokens a second of the whole engine on one GPU, plain and drafted from another process.

python -m tests.gpu.measure_pair OUT [SCRATCH]   writes OUT/pair.md and OUT/pair.json; exit status 1 if a text is wrong

Two pairs: the tiny one, with the drafts of its trained drafter; and one in the shape of Qwen3-8B and its drafter with
random weights, whose drafts are forced to be right to a set number. The latter takes 20 GB under SCRATCH (default: the
system's temporary folder) while it runs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deploy.local import LocalDrafter, LocalProcesses
from paceline.bench import engine_rows
from paceline.bench import prompts as prompt_files
from paceline.bench.engine_decoder import EngineDecoder
from paceline.bench.engine_rows import DISAGGREGATED, PLAIN, START_S, EngineSetup
from paceline.bench.figures import Row, row
from paceline.bench.interleave import measure as measure_runs
from paceline.bench.runs import Run
from tests.gpu.counting_pair import span, write_drafter, write_target
from tests.gpu.measure_kernels import NO_DEVICE, circumstances, copy_bandwidth, why_not, write_report

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES, TINY = ROOT / "deploy" / "architectures", ROOT / "models" / "tiny"
KEPT = (1, 3, 5, 7, 10)  # tokens of each verify that stand, its own among them


@dataclass(frozen=True)
class Load:
    """prompt: tokens of each; `concurrency`: requests at a time and, of a forced pair, in all. repeats: of a run."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    prompt: int = 512
    max_tokens: int = 256
    repeats: int = 3


@dataclass(frozen=True)
class PairRow:
    """pair: which. kept: tokens of each verify that were made to stand, None for a drafter's own drafts; right: whether
    every text was the target's, None where it is not known.
    """

    pair: str
    kept: int | None
    right: bool | None
    measured: Row


def main(arguments: list[str]) -> int:
    if (reason := why_not()) is not None:
        print(f"cannot measure pairs: {reason}", file=sys.stderr)
        return NO_DEVICE
    if len(arguments) not in (1, 2):
        print("usage: python -m tests.gpu.measure_pair OUT [SCRATCH]", file=sys.stderr)
        return 2
    rate, rows = copy_bandwidth(), list(tiny_pair("cuda", "bfloat16", Load()))
    torch.cuda.empty_cache()  # the engines are other processes
    with tempfile.TemporaryDirectory(dir=arguments[1] if len(arguments) == 2 else None) as scratch:
        target, drafter = Path(scratch) / "target", Path(scratch) / "drafter"
        write_target(ARCHITECTURES / "qwen3-8b.json", target, torch.bfloat16, "cuda")
        write_drafter(ARCHITECTURES / "qwen3-8b-dflash.json", drafter, torch.bfloat16, "cuda")
        torch.cuda.empty_cache()
        rows += forced_pair("qwen3-8b", target, drafter, "cuda", "bfloat16", KEPT, Load())
    write(Path(arguments[0]), rows, circumstances(rate))
    return 0 if all(each.right is not False for each in rows) else 1


def tiny_pair(device: str, dtype: str, load: Load) -> Iterator[PairRow]:
    """The shipped pair over the shipped prompts."""
    from transformers import AutoTokenizer

    target, drafter = TINY / "target", TINY / "drafter"
    context = json.loads((target / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    prompts, _ = prompt_files.fit(prompt_files.read(prompt_files.SHIPPED), tokenizer, load.max_tokens, context)
    setup = _setup(target, drafter, device, dtype, load, max(map(len, prompts)) + load.max_tokens)
    with ExitStack() as stack:
        decoders = [engine_rows.plain(setup, stack), engine_rows.disaggregated(setup, stack)]
        for level in load.concurrency:
            for found, _ in _rows(decoders, prompts, level, load):
                yield PairRow("tiny", None, None, found)


def forced_pair(
    name: str, target: Path, drafter: Path, device: str, dtype: str, kept: Sequence[int], load: Load
) -> Iterator[PairRow]:
    """The pair of counting_pair. kept: tokens of each verify that are to stand, up to the drafter's block size."""
    vocabulary = json.loads((target / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    block_size = json.loads((drafter / "config.json").read_text(encoding="utf-8"))["block_size"]
    part = span(vocabulary, block_size)
    if part <= load.max_tokens or max(kept) > block_size:
        raise ValueError(
            f"kept {max(kept)} and max_tokens {load.max_tokens} must fit blocks of {block_size} and parts of {part}"
        )
    setup = _setup(target, drafter, device, dtype, load, load.prompt + load.max_tokens)
    with ExitStack() as stack:
        decoders = [engine_rows.plain(setup, stack), _forced(setup, stack)]
        for level in load.concurrency:
            for stands in kept:
                first = (stands - 1) * part
                prompts = [_prompt(first, load.prompt, index) for index in range(level)]
                said = tuple(range(first + 1, first + 1 + load.max_tokens))
                for found, runs in _rows(decoders, prompts, level, load):
                    if found.name == DISAGGREGATED or stands == kept[0]:
                        right = all(text == said for run in runs for text in run.texts)
                        yield PairRow(name, None if found.name == PLAIN else stands, right, found)


def _prompt(last: int, length: int, index: int) -> tuple[int, ...]:
    """Of a request of its own; only its last token decides what follows."""
    return (*(index + at % 7 for at in range(length - 1)), last)


def _setup(target: Path, drafter: Path, device: str, dtype: str, load: Load, context: int) -> EngineSetup:
    return EngineSetup(
        target=target,
        drafter=drafter,
        tensor_parallel=1,
        dtype=dtype,
        kv_dtype="auto",
        device=device,
        requests=max(load.concurrency),
        context=context,
        temperature=0.0,
        stop_token_ids=frozenset(),
    )


def _forced(setup: EngineSetup, stack: ExitStack) -> EngineDecoder:
    """As engine_rows.disaggregated, over forced_rank. Always the most drafts, and no step without any."""
    drafter = stack.enter_context(LocalDrafter(setup.draft_service(), start_timeout_s=START_S))
    settings = setup.verifier("disaggregated")
    speculation = settings.speculation.model_copy(update={"adaptive": False, "soft_deadline_s": 10.0})
    settings = settings.model_copy(update={"speculation": speculation})
    command = [sys.executable, "-m", "tests.gpu.forced_rank", "--settings", "-", "--exit-with-parent"]
    rank = LocalProcesses([command], [_environment()], settings.model_dump_json(), START_S)
    stack.enter_context(rank)
    decoder = EngineDecoder(
        DISAGGREGATED, "forced drafts", rank.address, setup.stop_token_ids, 0.0, drafted=True, remote=True
    )
    stack.callback(decoder.close)
    decoder.link_to(drafter.address)
    return decoder


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _rows(
    decoders: Sequence[EngineDecoder], prompts: list[tuple[int, ...]], level: int, load: Load
) -> Iterator[tuple[Row, list[Run]]]:
    runs = measure_runs(decoders, prompts, level, load.max_tokens, load.repeats, _tell)
    for decoder in decoders:
        own = runs[decoder.name]
        yield row(decoder.name, level, own, runs[PLAIN], None, decoder.note), own


def _tell(_: int, note: str) -> None:
    print(note, flush=True)


def write(out: Path, rows: Sequence[PairRow], where: dict[str, Any]) -> None:
    lines = [
        "Tokens a second of all requests together, medians. Kept: tokens of each verify that were made to stand (the",
        "drafter works all the same); without it, a trained drafter's own drafts. Tau: tokens a step.",
        "",
        "| pair | engine | requests | kept | tau | tokens/s | to plain | waits for drafts | between forwards | text |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    record = {"rows": [asdict(each) for each in rows]}
    write_report(out / "pair", "Pairs of target and drafter, end to end on one device", where, lines, record)


def _line(each: PairRow) -> str:
    found = each.measured
    text = {True: "right", False: "WRONG", None: "-"}[each.right]

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [
        *(each.pair, found.name, str(found.concurrency), "-" if each.kept is None else str(each.kept)),
        *(shown(None if found.tau is None else found.tau.overall, ".2f"), f"{found.tokens_per_s:.1f}"),
        *(shown(found.ratio, ".2f"), shown(found.draft_share, ".0%"), shown(found.gap_share, ".0%"), text),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
