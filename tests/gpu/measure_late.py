"""What a request that the host works on costs the others on one GPU: they all run ahead, its tokens are taken late.

python -m tests.gpu.measure_late OUT [SCRATCH]   writes OUT/late.md and OUT/late.json; exit status 1 if a text is wrong

The engine runs in this process, over the counting target in the shape of Qwen3-8B (16 GB under SCRATCH meanwhile;
default: the system's temporary folder), whose text no penalty, bias or report changes.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.contracts import Delta, EngineInfo, EngineRequest, SamplingParams
from modeling.kernel_choice import KernelSetting
from tests.gpu.counting_pair import write_target
from tests.gpu.measure_kernels import NO_DEVICE, circumstances, copy_bandwidth, why_not, write_report
from tests.gpu.measure_pair import ARCHITECTURES
from verifier_service.engine import Engine
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.runner import TargetRunner
from verifier_service.scheduler import SchedulerLimits
from verifier_service.tally import gap_share

NOBODY = "nobody"
NEEDS = {
    NOBODY: SamplingParams(),
    "penalties": SamplingParams(frequency_penalty=0.01, repetition_penalty=1.01),
    "bias": SamplingParams(logit_bias=((0, -1.0),)),
    "log probabilities": SamplingParams(logprobs=5),
}
SHARE = 8  # one request in so many
BLOCK_TOKENS = 16
RUN_S = 300.0


@dataclass(frozen=True)
class Load:
    """prompt: tokens of each request. repeats: runs, of which the first counts for nothing."""

    requests: tuple[int, ...] = (8, 64, 256)
    prompt: int = 128
    max_tokens: int = 128
    repeats: int = 4


@dataclass(frozen=True)
class LateRow:
    """needs: what one request in SHARE asks for. step_ms: wall clock, median run. ahead, gap_share: of all steps and of
    their time, 0..1. right: whether every text was the target's.
    """

    needs: str
    requests: int
    step_ms: float
    ahead: float
    gap_share: float
    right: bool


def main(arguments: list[str]) -> int:
    if (reason := why_not()) is not None:
        print(f"cannot measure late tokens: {reason}", file=sys.stderr)
        return NO_DEVICE
    if len(arguments) not in (1, 2):
        print("usage: python -m tests.gpu.measure_late OUT [SCRATCH]", file=sys.stderr)
        return 2
    rate = copy_bandwidth()
    with tempfile.TemporaryDirectory(dir=arguments[1] if len(arguments) == 2 else None) as scratch:
        write_target(ARCHITECTURES / "qwen3-8b.json", Path(scratch), torch.bfloat16, "cuda")
        torch.cuda.empty_cache()
        rows = list(measure(Path(scratch), "cuda", torch.bfloat16, "triton", Load()))
    write(Path(arguments[0]), rows, circumstances(rate))
    return 0 if all(row.right for row in rows) else 1


def measure(target: Path, device: str, dtype: torch.dtype, kernels: KernelSetting, load: Load) -> Iterator[LateRow]:
    most, context = max(load.requests), load.prompt + load.max_tokens
    blocks = most * (-(-context // BLOCK_TOKENS) + 1)
    runner = TargetRunner(
        target,
        num_blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        num_slots=most,
        dtype=dtype,
        device=device,
        max_context=context,
        kernel_path=KernelPath(kernels, longest_row=1),
    )
    limits = SchedulerLimits(most, blocks, BLOCK_TOKENS, most * load.prompt, most, prefix_cache=False)
    info = EngineInfo("late", "", runner.shape.max_context, runner.shape.vocabulary, most, 1)
    engine = Engine(runner, limits, info, runs_ahead=True)
    engine.start()
    try:
        for requests in load.requests:
            for needs in NEEDS:
                runs = [_run(engine, requests, needs, load) for _ in range(load.repeats)][1:]
                row = sorted(runs, key=lambda run: run.step_ms)[len(runs) // 2]
                print(_line(row), flush=True)
                yield row
    finally:
        engine.stop()


def _run(engine: Engine, requests: int, needs: str, load: Load) -> LateRow:
    texts: dict[str, list[int]] = {f"{time.monotonic_ns()}-{index}": [] for index in range(requests)}
    left, over = [requests], threading.Event()

    def sink(deltas: list[Delta]) -> None:
        for delta in deltas:
            texts[delta.request_id] += delta.token_ids
            left[0] -= delta.finish is not None
        if not left[0]:
            over.set()

    before = engine.status().counters
    for index, name in enumerate(texts):
        prompt = (*(index + at % 7 for at in range(load.prompt - 1)), 0)  # only its last token decides what follows
        sampling = NEEDS[needs if index % SHARE == 0 else NOBODY]
        engine.submit(EngineRequest(name, prompt, 0, load.max_tokens, sampling=sampling), sink)
    if not over.wait(RUN_S):
        raise TimeoutError(f"{requests} requests, {needs}: not over within {RUN_S:g} s")
    after = engine.status().counters
    steps, ahead, seconds = (after[name] - before[name] for name in ("steps", "steps_ahead", "step_seconds"))
    said = list(range(1, load.max_tokens + 1))
    return LateRow(
        needs,
        requests,
        1000 * seconds / steps,
        ahead / steps,
        gap_share(before, after),
        all(text == said for text in texts.values()),
    )


def write(out: Path, rows: Sequence[LateRow], where: dict[str, Any]) -> None:
    lines = [
        f"One request in {SHARE} has needs. Ahead: steps launched before the one before was read. Gaps: of the steps'",
        "time, what the device waited for the host.",
        "",
        "| needs | requests | ms a step | ahead | gaps | text |",
        "|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    record = {"rows": [asdict(row) for row in rows]}
    write_report(out / "late", "Requests that the host works on, beside others", where, lines, record)


def _line(row: LateRow) -> str:
    text = "right" if row.right else "WRONG"
    return f"| {row.needs} | {row.requests} | {row.step_ms:.2f} | {row.ahead:.0%} | {row.gap_share:.0%} | {text} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
