"""Compile every kernel for a GPU that is not there: python -m tests.kernels.compile_all

Runs all cases of the GPU measurement in tiny sizes on CPU tensors; a launch compiles down to machine code of
compute capability 9.0 and goes no further. Prints a line for each kernel: name, bytes of shared memory and of code.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_MEMORY = 232_448  # bytes a block may use on compute capability 9.0


class NoDevice:
    """As much of a Triton driver as compiling takes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def only_compile() -> dict[tuple[str, str], Any]:
    """From now on this process's launches compile, and no more than that -> what they compile, by name and hash."""
    triton.runtime.driver.set_active(NoDevice())
    launch = JITFunction.run
    seen: dict[tuple[str, str], Any] = {}

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *arguments, warmup=True, **options)
        seen[self.__name__, compiled.hash] = compiled
        return compiled

    JITFunction.run = compile_only
    return seen


def main() -> None:
    torch.set_num_threads(1)
    seen = only_compile()
    from tests.gpu.cases import Machine, cases

    for case in cases(Machine("cpu", torch.bfloat16, shrink=64)):
        case.run()
    for (name, _), compiled in seen.items():
        shared, code = compiled.metadata.shared, len(compiled.asm["cubin"])
        assert shared <= SHARED_MEMORY, f"{name} wants {shared} bytes of shared memory"
        print(name, shared, code)


if __name__ == "__main__":
    main()
