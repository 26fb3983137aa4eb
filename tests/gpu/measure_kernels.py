"""Check every kernel on this machine's GPU, then time it beside torch's own operation and the physical floor.

python -m tests.gpu.measure_kernels OUT      writes OUT/kernels.md and OUT/kernels.json; exit status 1 if a check fails
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

NO_DEVICE = 3  # exit status


@dataclass(frozen=True)
class Measured:
    """Medians in microseconds. floor: bytes moved at the measured copy bandwidth, or products at the measured rate of a
    large one, whichever takes longer. error: largest excess over tolerance
    of a result, as a multiple of it (1 passes just so).
    """

    name: str
    kernel: float
    library: float | None
    floor: float
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= 1.0


def main(arguments: list[str]) -> int:
    reason = why_not()
    if reason is not None:
        print(f"cannot measure kernels: {reason}", file=sys.stderr)
        return NO_DEVICE
    if len(arguments) != 1:
        print("usage: python -m tests.gpu.measure_kernels OUT", file=sys.stderr)
        return 2
    # Only now: kernels decide on import whether they are compiled
    from tests.gpu.cases import Machine, cases

    torch.manual_seed(0)
    rate, products = copy_bandwidth(), product_rate()
    results = []
    for case in cases(Machine("cuda", torch.bfloat16)):
        error = worst_error(case.run(), case.reference(), case.tolerance)
        torch.cuda.empty_cache()
        library = None if case.library is None else median_us(case.library)
        floor = max(case.moved / rate, case.flops / products) * 1e6
        results.append(Measured(case.name, median_us(case.run), library, floor, error))
        print(row(results[-1]), flush=True)
    write(Path(arguments[0]), results, rate)
    return 0 if all(result.passed for result in results) else 1


def why_not() -> str | None:
    """The reason why this process cannot run compiled kernels, with its cure; None if it can."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        return "TRITON_INTERPRET is set, so that kernels would be interpreted on the CPU: unset it"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no CUDA device: run this on a machine with one, with a CUDA build of torch"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0, which bfloat16 needs"
    return None


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy: what the device's memory gives at best."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_us(lambda: target.copy_(source)) * 1e6


def product_rate() -> float:
    """Floating-point operations a second of a large product in bfloat16."""
    left, right = torch.randn(2, 8192, 8192, device="cuda").bfloat16().unbind()
    return 2 * 8192**3 / median_us(lambda: left @ right) * 1e6


def median_us(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median of `repeats` runs by CUDA events, after a warm-up, the L2 cache flushed before each."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def worst_error(got: Any, want: Any, tolerance: float) -> float:
    """Largest |got - want| / (tolerance * (1 + |want|)) over all tensors; infinity where a number is not finite."""
    if isinstance(got, torch.Tensor):
        got, want = (got,), (want,)
    worst = 0.0
    for own, expected in zip(got, want, strict=True):
        gap = (own.double() - expected.double()).abs() / (tolerance * (1 + expected.double().abs()))
        worst = max(worst, float(gap.nan_to_num(nan=float("inf")).max()))
    return worst


def row(result: Measured) -> str:
    library = "-" if result.library is None else f"{result.library:.1f}"
    verdict = "ok" if result.passed else f"WRONG ({result.error:.1f} x tolerance)"
    share = 100 * result.floor / result.kernel
    return f"| {result.name} | {result.kernel:.1f} | {library} | {result.floor:.1f} | {share:.0f}% | {verdict} |"


def circumstances(rate: float) -> dict[str, Any]:
    """Where and with what was measured. rate: the measured copy bandwidth, bytes a second."""
    import triton

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "copy_bandwidth_gb_s": round(rate / 1e9),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": "tests/gpu/run.sh",
    }


def write(out: Path, results: list[Measured], rate: float) -> None:
    lines = [
        "Medians in microseconds, L2 flushed before each run. Floor: the bytes that must move, at the copy "
        "bandwidth; of a head's many rows its product, at the rate of a large one.",
        "",
        "| case | kernel | torch | floor | share of the floor | check |",
        "|---|---|---|---|---|---|",
        *map(row, results),
    ]
    record = {"results": [asdict(result) for result in results]}
    write_report(out / "kernels", "Kernels, measured", circumstances(rate), lines, record)


def write_report(
    stem: Path, title: str, where: Mapping[str, Any], lines: Sequence[str], record: dict[str, Any]
) -> None:
    """STEM.md: title, circumstances and lines; STEM.json: circumstances and record."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    text = [f"# {title}", ", ".join(f"{key} {value}" for key, value in where.items()), "", *lines]
    stem.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps({**where, **record}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
