"""Two processes over gloo: the target on two ranks over kernels says what one says, and the link carries features."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.measure_two import Task, measure
from tests.verifier_service.gpu_path.tiny import OVERRIDES
from tests.verifier_service.model import tiny_targets

ROOT = Path(__file__).resolve().parents[3]


def test_two_ranks_and_a_link_are_checked_and_timed(tmp_path):
    tiny_targets.build("qwen3", tmp_path, **OVERRIDES["qwen3"])
    found = measure(Task(str(tmp_path), "cpu", torch.float32, prompt=5, steps=2, rows=3, hidden=8, sends=2))
    assert found["passed"]
    assert found["worst_logit"] < 1e-5 < found["largest_logit"]
    assert min(found["step_seconds"], found["step_seconds_alone"], found["link_seconds"]) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so_and_exits_with_3(tmp_path):
    done = subprocess.run(
        [ROOT / "tests" / "gpu" / "run_multi.sh", tmp_path],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 3
    assert "sees no CUDA device" in done.stderr
