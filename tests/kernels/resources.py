"""What every kernel takes of a multiprocessor in production shapes: python -m tests.kernels.resources [WORD]

Compiles the cases of the GPU measurement (those with WORD in their names) in full size for compute capability 9.0, and
reads the machine code: registers of a thread, bytes that a thread spills to memory and how many
instructions of loops do, instructions of the longest innermost loop, shared memory of a program, and how many programs
fit on a multiprocessor side by side. Exit status 1 if a kernel spills in a loop.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from re import compile as pattern
from re import match, search
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends import nvidia

from tests.kernels.compile_all import SHARED_MEMORY, only_compile

THREADS, REGISTERS, PROGRAMS = 2048, 65_536, 32  # of a multiprocessor of compute capability 9.0
SHARED_OF_ALL, RESERVED = 233_472, 1024  # bytes of its shared memory, and what every program takes beside its own
LARGE = 1 << 26  # entries
TOOLS = Path(nvidia.__file__).parent / "bin"
JUMP = pattern(r"\bBRA\b.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Resources:
    """registers, spilled (bytes): of a thread; in_loops: instructions in loops that move what is spilled; loop: of the
    longest loop without one inside; shared (bytes): of a program.
    """

    registers: int
    spilled: int
    in_loops: int
    loop: int
    shared: int
    warps: int
    stages: int

    @property
    def programs(self) -> int:
        """That run on one multiprocessor at a time. Registers are dealt out to warps, 256 at a time."""
        of_a_warp = -(-self.registers * 32 // 256) * 256
        return min(
            PROGRAMS,
            THREADS // (32 * self.warps),
            REGISTERS // (of_a_warp * self.warps),
            SHARED_OF_ALL // (self.shared + RESERVED),
        )


class NoContents(TorchFunctionMode):
    """Large random tensors, and what is made of them, have no contents, and so take neither time nor memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("randn", "rand", "randint"):
            shape = args[-1] if isinstance(args[-1], tuple | list) else args  # integers come with a tuple
            if prod(shape) >= LARGE:
                return torch.empty(shape, dtype=options.get("dtype"), device="meta")
        if any(tensor.is_meta for tensor in tree_leaves((args, options)) if isinstance(tensor, torch.Tensor)):
            args, options = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, options))
        return func(*args, **options)


def resources(compiled: Any) -> Resources:
    """Of what Triton compiled."""
    command = [str(TOOLS / "ptxas"), "-v", "--gpu-name=sm_90a", "-", "-o", "/dev/null"]
    told = subprocess.run(command, input=compiled.asm["ptx"], capture_output=True, text=True, check=True, timeout=300)
    registers, spilled = search(r"Used (\d+) registers", told.stderr), search(r"(\d+) bytes spill stores", told.stderr)
    assert registers is not None, f"ptxas does not tell what a kernel takes: {told.stderr}"
    assert spilled is not None, f"ptxas does not tell what a kernel spills: {told.stderr}"
    metadata = compiled.metadata
    in_loops, longest = loops(compiled.asm["cubin"])
    if int(spilled[1]) == 0:
        in_loops = 0  # sine and cosine of large angles have a table there
    return Resources(
        int(registers[1]),
        int(spilled[1]),
        in_loops,
        longest,
        *(metadata.shared, metadata.num_warps, metadata.num_stages),
    )


def loops(cubin: bytes) -> tuple[int, int]:
    """(instructions in loops that move what is spilled, instructions of the longest innermost loop)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "-c", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in told.splitlines():
        if label := match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif match(r"\s+/\*[0-9a-f]+\*/", line):
            instructions.append(line)
    jumps = ((labels.get(found[1], at), at) for at, line in enumerate(instructions) if (found := JUMP.search(line)))
    bodies = [(to, at + 1) for to, at in jumps if to < at]
    inside = {at for begin, end in bodies for at in range(begin, end) if search(r"\b(LDL|STL)\b", instructions[at])}
    innermost = [
        end - begin
        for begin, end in bodies
        if not any(begin <= a and b <= end and (a, b) != (begin, end) for a, b in bodies)
    ]
    return len(inside), max(innermost, default=0)


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    seen = only_compile()
    from tests.gpu.cases import Machine, cases

    told: dict[tuple[str, str], Resources] = {}
    print("| case | kernel | warps | stages | registers | spilled | in loops | loop | shared | programs |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with NoContents():
        for case in cases(Machine("cpu", torch.bfloat16)):
            if arguments and arguments[0] not in case.name:
                continue
            case.run()
            for key in seen.keys() - told.keys():
                own = told[key] = resources(seen[key])
                assert own.shared <= SHARED_MEMORY, f"{case.name}: {key[0]} wants {own.shared} bytes of shared memory"
                print(
                    f"| {case.name} | `{key[0]}` | {own.warps} | {own.stages} | {own.registers} | {own.spilled} "
                    f"| {own.in_loops} | {own.loop} | {own.shared} | {own.programs} |",
                    flush=True,
                )
    return 1 if any(own.in_loops for own in told.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
