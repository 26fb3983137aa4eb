"""Time verify steps of targets with random weights in published shapes, on the kernels and in CUDA graphs.

python -m tests.gpu.measure_steps OUT [SHAPE ...]

Writes OUT/steps/SHAPE.json (its format: deploy/steps/README.md) and OUT/steps.md.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.gpu.measure_kernels import NO_DEVICE, circumstances, copy_bandwidth, why_not
from tests.gpu.random_target import RandomTarget, Slice, cut, random_target
from tests.gpu.step_trace import gap_share
from verifier_service.plan import StepPlan, VerifyRow

ARCHITECTURES = Path(__file__).resolve().parents[2] / "deploy" / "architectures"
USABLE = 0.85  # share of a device's free memory that weights and cache may take


@dataclass(frozen=True)
class Shape:
    """layers: that are measured; 0: as many as fit, in whole periods. ranks: of which the first one is measured."""

    name: str
    architecture: str
    layers: int | None = None
    ranks: int = 1
    period: int = 1
    stock: bool = False


SHAPES = (
    Shape("qwen3-8b", "qwen3-8b.json", stock=True),
    Shape("qwen3.5-35b-a3b", "qwen3.5-35b-a3b.json", layers=0, period=4),
    Shape("qwen3.5-397b-a17b-rank-of-8", "qwen3.5-397b-a17b.json", layers=0, ranks=8, period=4),
)
BATCHES, ROWS, CONTEXTS = (1, 4, 16, 64), (1, 2, 4, 8, 16), (2048, 32_768)
KEPT = (1, 3, 5, 7, 10)  # tokens that stay of each verify of the most rows, in the run with forced acceptance


@dataclass(frozen=True)
class VerifyStep:
    """Of `requests` verify rows of `rows` tokens each, the last of them at position context - 1. Seconds, medians:
    seconds: of a step in a run of them; host_seconds: until its launches are made; floor_seconds: of the bytes that
    must move, at the copy bandwidth; stock_seconds: transformers' forward of the same model, None where it was not run.
    """

    requests: int
    rows: int
    context: int
    seconds: float
    host_seconds: float
    floor_seconds: float
    stock_seconds: float | None = None


def main(arguments: list[str]) -> int:
    if (reason := why_not()) is not None:
        print(f"cannot measure steps: {reason}", file=sys.stderr)
        return NO_DEVICE
    if not arguments:
        print("usage: python -m tests.gpu.measure_steps OUT [SHAPE ...]", file=sys.stderr)
        return 2
    rate, out = copy_bandwidth(), Path(arguments[0])
    chosen = [shape for shape in SHAPES if not arguments[1:] or shape.name in arguments[1:]]
    for shape in chosen:
        with tempfile.TemporaryDirectory() as room:
            part = fitting(shape, Path(room))
            record = measure(shape.name, part, BATCHES, ROWS, CONTEXTS, torch.bfloat16, "cuda", rate, stock=shape.stock)
        write(out, {**circumstances(rate), **record})
        torch.cuda.empty_cache()
    return 0


def fitting(shape: Shape, room: Path) -> Slice:
    """The shape, cut to the layers whose weights take no more than half of the device."""
    file = ARCHITECTURES / shape.architecture
    if shape.layers != 0:
        return cut(file, shape.layers, room, shape.ranks)
    from verifier_service.model.touchpoints import text_shapes

    whole = cut(file, None, room, shape.ranks)
    one = cut(file, shape.period, room, shape.ranks)
    numel = {name: torch.Size(size).numel() for name, size in text_shapes(one.config).items()}
    layered = 2 * sum(count for name, count in numel.items() if name.startswith("layers.")) // shape.ranks
    periods = int(0.5 * torch.cuda.mem_get_info()[0] // layered)
    layers = min(whole.config.layers, max(1, periods) * shape.period)
    return cut(file, layers, room, shape.ranks)


@torch.inference_mode()
def measure(
    name: str,
    part: Slice,
    batches: Sequence[int],
    rows: Sequence[int],
    contexts: Sequence[int],
    dtype: torch.dtype,
    device: str,
    rate: float,
    *,
    repeats: int = 20,
    block_tokens: int = 16,
    stock: bool = False,
) -> dict[str, Any]:
    """What goes into the file, but for the circumstances."""
    longest, deepest = max(rows), max(contexts)
    tokens = _capacity(part, batches, contexts, dtype, device)
    began = time.perf_counter()
    target = random_target(
        part,
        requests=max(batches),
        longest_row=longest,
        tokens=tokens + block_tokens * max(batches),
        max_context=deepest + block_tokens,
        block_tokens=block_tokens,
        taps=(0, part.config.layers - 1),
        dtype=dtype,
        device=device,
    )
    ready = time.perf_counter() - began
    steps = []
    driver = Driver(target, max(batches), block_tokens, device)
    for context in contexts:
        for batch in batches:
            if batch * context > tokens:
                print(f"{name}: left out, {batch} x {context} tokens do not fit into memory", file=sys.stderr)
                continue
            driver.seat(batch, context)
            for each in rows:
                seconds, host = driver.time(batch, each, context, repeats)
                floor = target.floor_bytes(batch, batch * each, context) / rate
                steps.append(VerifyStep(batch, each, context, seconds, host, floor))
                print(_row(name, steps[-1]), flush=True)
    forced, trace = [], None
    if steps:
        driver.seat(1, contexts[0])
        trace = gap_share(partial(driver.run, 1, longest, contexts[0], 10), device)
        plain = next(step for step in steps if (step.requests, step.rows) == (1, rows[0]))
        for kept in (kept for kept in KEPT if kept <= longest):
            per_step = driver.run(1, longest, contexts[0], repeats, kept=kept) / repeats
            forced.append({"kept": kept, "tokens_per_second": kept / per_step, "plain": 1 / plain.seconds})
    counters = dict(target.executor.counters)
    del driver, target
    if stock:
        steps = list(_beside_stock(part, steps, dtype, device, repeats))
    return {
        "format": 1,
        "shape": name,
        "ranks": part.ranks,
        "layers": part.config.layers,
        "seconds_to_load_and_capture": ready,
        "graphs_failed": counters["graph_failures"],
        "verify": [asdict(step) for step in steps],
        "forced_acceptance": forced,
        "gap_share": trace,
    }


class Driver:
    """Gives an executor one plan after the other, as an engine would that never reads a result."""

    def __init__(self, target: RandomTarget, slots: int, block_tokens: int, device: str):
        self._target, self._slots, self._block_tokens, self._cuda = target, slots, block_tokens, device == "cuda"
        self._step = 0

    def seat(self, requests: int, context: int) -> None:
        """Give each request the blocks of its context."""
        each = -(-context // self._block_tokens) + 1
        blocks = tuple((slot, slot * each + index) for slot in range(requests) for index in range(each))
        released = tuple(range(self._slots))
        self._target.executor.execute(StepPlan(0, released=released, new_blocks=blocks), (), None)

    def time(self, requests: int, rows: int, context: int, repeats: int) -> tuple[float, float]:
        """Seconds of a step, and of its launches, medians over runs of steps."""
        hosts: list[float] = []
        self.run(requests, rows, context, 2)
        runs = [self.run(requests, rows, context, repeats, hosts) / repeats for _ in range(3)]
        return statistics.median(runs), statistics.median(hosts)

    def run(
        self, requests: int, rows: int, context: int, count: int, hosts: list[float] | None = None, kept: int = 0
    ) -> float:
        """Seconds of `count` steps, one behind the other. kept: tokens of each that are committed (0: all)."""
        start = context - rows
        verify = tuple(VerifyRow(slot, start, tuple(range(1, rows + 1))) for slot in range(requests))
        decided = tuple((slot, kept or rows) for slot in range(requests))
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            self._step += 1
            before = time.perf_counter()
            self._target.executor.execute(StepPlan(self._step, verify=verify, decided=decided, draws=()), (), None)
            if hosts is not None:
                hosts.append(time.perf_counter() - before)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def _capacity(part: Slice, batches: Sequence[int], contexts: Sequence[int], dtype: torch.dtype, device: str) -> int:
    """Tokens of the largest batch and context that fit beside the weights."""
    from modeling.families import shard_map
    from modeling.footprint import cache_footprint
    from verifier_service.model.touchpoints import text_shapes

    sizes = sorted({batch * context for batch in batches for context in contexts})
    if device == "cpu":
        return sizes[-1]
    shapes = text_shapes(part.config)
    shards = shard_map(part.config, part.ranks)
    cache = cache_footprint(part.config, shapes, shards, part.ranks, dtype.itemsize)
    weights = sum(
        torch.Size(shards.of(name).part_shape(tuple(shape), 0, part.ranks)).numel() * dtype.itemsize
        for name, shape in shapes.items()
    )
    free = USABLE * torch.cuda.mem_get_info()[0] - weights - max(batches) * cache.state_bytes
    return max((size for size in sizes if size * cache.token_bytes <= free), default=sizes[0])


def _beside_stock(
    part: Slice, steps: Sequence[VerifyStep], dtype: torch.dtype, device: str, repeats: int
) -> Iterator[VerifyStep]:
    """The steps with the time of transformers' own forward over a dense cache, where that fits into memory."""
    from tests.gpu.stock_steps import StockTarget

    stock = StockTarget(part.config, dtype, device)
    for step in steps:
        seconds = stock.seconds(step.requests, step.rows, step.context, repeats)
        yield VerifyStep(**{**asdict(step), "stock_seconds": seconds})


def _row(name: str, step: VerifyStep) -> str:
    figures = (step.seconds * 1e3, step.host_seconds * 1e3, step.floor_seconds * 1e3, step.seconds / step.floor_seconds)
    stock = "-" if step.stock_seconds is None else f"{step.stock_seconds * 1e3:.2f}"
    cells = [name, str(step.requests), str(step.rows), str(step.context), *(f"{x:.2f}" for x in figures), stock]
    return f"| {' | '.join(cells)} |"


def write(out: Path, record: dict[str, Any]) -> None:
    """OUT/steps/SHAPE.json, and the table of all shapes that are there."""
    folder = out / "steps"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{record['shape']}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Verify steps, measured",
        "Milliseconds, medians. Floor: the bytes that must move, at the copy bandwidth. Stock: transformers' forward.",
        "",
        "| shape | requests | rows each | context | step | host | floor | step / floor | stock |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        where = ", ".join(f"{key} {found[key]}" for key in ("device", "torch", "triton", "date") if key in found)
        lines.insert(2, f"{found['shape']}: {found['layers']} layers, rank 1 of {found['ranks']}; {where}")
        lines += [_row(found["shape"], VerifyStep(**step)) for step in found["verify"]]
    (out / "steps.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
