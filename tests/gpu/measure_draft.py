"""Time draft steps of drafters in the shape of Qwen3-8B's, DFlash and DFlash 2, on kernels and torch's operations.

python -m tests.gpu.measure_draft OUT

Writes OUT/draft.md, OUT/draft.json and OUT/drafts/SHAPE.json (its format: deploy/steps/README.md). Exit status 1 if the
drafts disagree.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drafter_service.attention import Block
from drafter_service.blocks import BlockDrafter, BlockDrafting
from drafter_service.context import ContextTable
from drafter_service.loading import LoadedDrafter
from tests.gpu.measure_kernels import NO_DEVICE, circumstances, copy_bandwidth, why_not, write_report
from tests.gpu.random_drafter import QWEN3_8B, QWEN3_8B_SECOND, DrafterShape, random_drafter

SHAPES = {"qwen3-8b-dflash": QWEN3_8B, "qwen3-8b-dflash2": QWEN3_8B_SECOND}
COMMITTED = 5  # tokens that a request commits between two drafts
SHORTER = (2, 4, 8)  # rows a block, beside whole blocks
LEAST_AGREEMENT = 0.5  # random logits lie so close together that rounding changes some of the tokens
LEAST_AGREEMENT_SECOND = 0.2  # and with a selector, each that is changed changes those behind it
USABLE = 0.9  # share of the free memory that contexts may take


@dataclass(frozen=True)
class DraftStep:
    """Medians in milliseconds, host time from numbers in to numbers out, of `batch` blocks over `context` tokens each.

    torch, agreement: the same step with torch's operations, and how many of the tokens are the same; None where that
    does not fit into memory. weights_floor: reading layers and head once; floor: contexts too; both at the copy
    bandwidth. inject: of COMMITTED tokens' features for every request. shorter: the same draft with fewer rows a block,
    by their number. second: of DFlash 2, convolutions, candidates and selector included.
    """

    batch: int
    context: int
    draft: float
    torch: float | None
    agreement: float | None
    weights_floor: float
    floor: float
    inject: float
    shorter: dict[int, float] = field(default_factory=dict)
    second: bool = False

    @property
    def passed(self) -> bool:
        least = LEAST_AGREEMENT_SECOND if self.second else LEAST_AGREEMENT
        return self.agreement is None or self.agreement >= least


def main(arguments: list[str]) -> int:
    reason = why_not()
    if reason is not None:
        print(f"cannot measure drafts: {reason}", file=sys.stderr)
        return NO_DEVICE
    if len(arguments) != 1:
        print("usage: python -m tests.gpu.measure_draft OUT", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rate = copy_bandwidth()
    steps: list[DraftStep] = []
    for name, shape in SHAPES.items():
        own: list[DraftStep] = []
        for context in (2048, 32_768):
            own += measure(shape, context, (1, 4, 16, 64), torch.bfloat16, "cuda", rate)
        write_table(Path(arguments[0]), name, shape.block_size, own, circumstances(rate))
        steps += own
    write(Path(arguments[0]), steps, rate)
    return 0 if all(step.passed for step in steps) else 1


@torch.inference_mode()
def measure(
    shape: DrafterShape,
    context: int,
    batches: Sequence[int],
    dtype: torch.dtype,
    device: str,
    rate: float,
    repeats: int = 20,
) -> list[DraftStep]:
    """Contexts that do not fit beside the weights are left out, largest batch first, and named on standard error."""
    from drafter_service.kernel_blocks import KernelDrafter  # decides on import whether kernels are compiled

    loaded = random_drafter(shape, context, dtype, device)
    fitting = [batch for batch in batches if _fits(shape, batch * (context + shape.block_size), dtype, device)]
    for batch in sorted(set(batches) - set(fitting)):
        print(f"left out: {batch} contexts of {context} tokens do not fit into memory", file=sys.stderr)
    if not fitting:
        return []
    drafter, plain = KernelDrafter(loaded, max(fitting)), None
    table = _filled(drafter, max(fitting), context)
    if _fits(shape, 2 * max(fitting) * (context + shape.block_size), dtype, device):  # its masks and copies, too
        plain = BlockDrafter(loaded, max(fitting))
        plain.pool.kv.copy_(drafter.pool.kv)
        plain.pool.positions.copy_(drafter.pool.positions)
    steps = []
    for batch in fitting:
        blocks = [
            Block(slot * drafter.pool.stride, context, context, shape.block_size, stale=False) for slot in range(batch)
        ]
        draft, own = _median_ms(partial(drafter.draft, blocks, range(batch)), repeats)
        torch_ms, agreement = None, None
        if plain is not None:
            torch_ms, right = _median_ms(partial(plain.draft, blocks, range(batch)), repeats)
            same = [a == b for (x, _), (y, _) in zip(own, right) for a, b in zip(x, y)]
            agreement = sum(same) / len(same)
        weights = shape.weights * dtype.itemsize / rate * 1e3
        contexts = batch * context * shape.row * dtype.itemsize / rate * 1e3
        shorter = {}
        for rows in (rows for rows in SHORTER if rows < shape.block_size):
            cut = [replace(block, rows=rows) for block in blocks]
            shorter[rows] = _median_ms(partial(drafter.draft, cut, range(batch)), repeats)[0]
        floor, second = weights + contexts, shape.second is not None
        steps.append(DraftStep(batch, context, draft, torch_ms, agreement, weights, floor, 0.0, shorter, second))
    # Only now: appends change what the drafts are made from
    steps = [replace(step, inject=_inject_ms(drafter, loaded, table, step.batch, repeats)) for step in steps]
    print(*map(_row, steps), sep="\n", flush=True)
    return steps


def _fits(shape: DrafterShape, rows: int, dtype: torch.dtype, device: str) -> bool:
    wanted = rows * (shape.row * dtype.itemsize + 8)
    return device == "cpu" or wanted <= USABLE * torch.cuda.mem_get_info()[0]


def _filled(drafter: BlockDrafting, contexts: int, context: int) -> ContextTable:
    """All slots full of normal keys and values at positions 0, 1, ..."""
    table, pool = ContextTable(contexts, context), drafter.pool
    for layer in pool.kv:
        layer.normal_()
    for number in range(contexts):
        placement = table.append(("", str(number)), 0, context)
        assert placement is not None, "there is a slot for each"
        first = pool.first_row(placement.context)
        pool.positions[first : first + context] = torch.arange(context, device=pool.positions.device)
    return table


def _inject_ms(drafter: BlockDrafting, loaded: LoadedDrafter, table: ContextTable, batch: int, repeats: int) -> float:
    features = torch.randn(COMMITTED, loaded.config.hidden, dtype=loaded.model.dtype, device=loaded.model.device)
    ends = [table.get(("", str(number))) for number in range(batch)]

    def inject() -> None:
        for number, context in enumerate(ends):
            assert context is not None, "it was appended"
            placement = table.append(("", str(number)), context.watermark, COMMITTED)
            assert placement is not None, "it has its slot"
            drafter.pool.stage(placement, features)
        drafter.pool.flush()
        if features.is_cuda:
            torch.cuda.synchronize()

    return _median_ms(inject, repeats)[0]


def _median_ms(call, repeats: int):
    """Milliseconds, and what the last call returned."""
    times, result = [], None
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times[2:])[repeats // 2], result


def _row(step: DraftStep) -> str:
    plain = "-" if step.torch is None else f"{step.torch:.2f}"
    agreement = "-" if step.agreement is None else f"{step.agreement:.0%}{'' if step.passed else ' WRONG'}"
    figures = (
        *(step.draft, step.weights_floor, step.floor, step.draft / step.weights_floor, step.draft / step.floor),
        step.inject,
    )
    cells = ["DFlash 2" if step.second else "DFlash", str(step.batch), str(step.context), plain, agreement]
    cells += (f"{figure:.2f}" for figure in figures)
    return f"| {' | '.join(cells)} |"


def write(out: Path, steps: Sequence[DraftStep], rate: float) -> None:
    lines = [
        "Random weights in the shape of Qwen3-8B's drafters (5 layers, block 16, bfloat16). Medians in milliseconds of",
        "host time. Floors: weights (and contexts) read once at the copy bandwidth. Same: share of the tokens on which",
        f"kernels and torch's operations agree. Inject: {COMMITTED} tokens' context KV for each request.",
        "",
        "| drafter | batch | context | torch | same | draft | weights floor | floor | draft / weights | draft / floor "
        "| inject |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_row, steps),
    ]
    record = {"steps": [asdict(step) for step in steps]}
    write_report(out / "draft", "Draft steps, measured", circumstances(rate), lines, record)


def write_table(out: Path, shape: str, block_size: int, steps: Sequence[DraftStep], where: dict[str, Any]) -> None:
    """OUT/drafts/SHAPE.json."""
    draft = [
        {
            "contexts": step.batch,
            "rows": rows,
            "window": step.context,
            "seconds": milliseconds / 1e3,
            "inject_seconds": step.inject / 1e3,
        }
        for step in steps
        for rows, milliseconds in sorted({**step.shorter, block_size: step.draft}.items())
    ]
    file = out / "drafts" / f"{shape}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {**where, "format": 1, "shape": shape, "block_size": block_size, "draft": draft}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
