"""Long prompts: memory grows with the KV cache and one step's work, not with the square of the context."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

STEP_MB = 220.0  # one step of 2,048 tokens, whatever came before
TOKEN_KB = 10.0  # KV cache, and what one attention call reads of it


def figures(tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.verifier_service.long_context", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_prompt_beyond_the_trained_length_is_served():
    got = figures(4100)
    assert got["output"] == 8
    assert got["peak_mb"] < STEP_MB + 4100 * TOKEN_KB / 1024


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_prompt_of_a_hundred_thousand_tokens_runs_in_bounded_memory():
    got = figures(100_000)
    print(got)
    assert got["output"] == 8
    assert got["peak_mb"] < STEP_MB + 100_000 * TOKEN_KB / 1024
