"""The cases of the GPU measurement are right, as far as that shows without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.cases import Machine, cases
from tests.gpu.measure_kernels import NO_DEVICE, Measured, row, worst_error
from tests.kernels.resources import Resources

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "_attend",
    "_add_sections",
    "_sections",
    "_join",
    "_verify",
    "_replay",
    "_rotate_and_append",
    "_norm",
}
KERNELS |= {"_head_race", "_head_logits"}
KERNELS |= {"_race", "_finish", "_accept", "_verify_conv", "_convolve_tokens", "_append"}
KERNELS |= {"_write_context", "_write_block", "_attend_block", "_join_sections"}
KERNELS |= {"_candidate_sections", "_join_candidates", "_walk", "_convolve"}
KERNELS |= {"_product", "_add"}
KERNELS |= {"_solve_tiles", "_walk_tiles", "_read_tiles"}
KERNELS |= {"_attend_latents", "_append_latents", "_copy_section", "_attend_section"}
KERNELS |= {"_route", "_count", "_fill", "_gate_up", "_gate", "_down", "_combine"}
KERNELS |= {"_survey", "_gather", "_threshold", "_collect", "_narrow"}
KERNELS |= {"_activate", "_gated_norm", "_delta_inputs"}


def without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_every_case_agrees_with_its_reference_in_a_small_size():
    for case in cases(Machine("cpu", torch.float32, shrink=64)):
        assert worst_error(case.run(), case.reference(), min(case.tolerance, 1e-4)) <= 1, case.name
        if case.library is not None:
            case.library()


def test_every_kernel_compiles_for_a_gpu_in_bfloat16(tmp_path: Path):
    command = [sys.executable, "-m", "tests.kernels.compile_all"]
    environment = {**without_interpreter(), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == KERNELS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_measuring_without_a_gpu_is_refused_with_the_reason(tmp_path: Path):
    environment = {**without_interpreter(), "PYTHON": sys.executable}
    command = [str(ROOT / "tests/gpu/run.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == NO_DEVICE
    assert "sees no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_result_fails_the_check():
    assert worst_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-3) > 1
    assert worst_error(torch.tensor([float("nan")]), torch.tensor([1.0]), 1e-3) == float("inf")
    assert "WRONG" in row(Measured("a kernel", 10.0, None, 5.0, error=2.0))


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(182, 82_432, 4, 2), (255, 16, 8, 1), (128, 16, 8, 2), (32, 0, 1, 32), (16, 0, 16, 4), (32, 147_712, 4, 1)],
)
def test_programs_side_by_side_share_registers_shared_memory_and_threads(registers, shared, warps, programs):
    assert Resources(registers, 0, 0, 0, shared, warps, 3).programs == programs
