"""One long prompt and a few tokens after it on the tiny target, its context stretched by YaRN; figures as JSON.

python -m tests.verifier_service.long_context 100000
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from cluster.contracts import Delta, EngineInfo, EngineRequest
from verifier_service.engine import Engine
from verifier_service.model.runner import TargetRunner
from verifier_service.scheduler import SchedulerLimits

TINY = Path(__file__).parents[2] / "models/tiny/target"
BLOCK, STEP, OUTPUT = 16, 2048, 8
LONGEST = 1 << 18
WITHIN_S = 3600.0


def stretched(directory: Path) -> Path:
    """The tiny target as a model of 262,144 positions."""
    for file in TINY.iterdir():
        shutil.copy(file, directory)
    config = json.loads((TINY / "config.json").read_text())
    trained = config["max_position_embeddings"]
    config["max_position_embeddings"] = LONGEST
    config["rope_parameters"] |= {
        "rope_type": "yarn",
        "factor": LONGEST / trained,
        "original_max_position_embeddings": trained,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def anonymous_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def measure(tokens: int) -> dict[str, float]:
    """peak_mb: over the loaded model, KV cache included. seconds: of CPU, to the last token."""
    torch.set_num_threads(1)
    blocks = -(-(tokens + OUTPUT) // BLOCK) + 1
    with tempfile.TemporaryDirectory() as directory:
        runner = TargetRunner(
            stretched(Path(directory)),
            num_blocks=blocks,
            block_tokens=BLOCK,
            num_slots=1,
            dtype=torch.float32,
            device="cpu",
        )
    info = EngineInfo("long", "", LONGEST, runner.shape.vocabulary, 1, 1)
    engine = Engine(runner, SchedulerLimits(1, blocks, BLOCK, STEP, 1), info)
    prompt = tuple(3 + (7919 * i) % 4000 for i in range(tokens))
    deltas: list[Delta] = []
    over = threading.Event()

    def sink(new: list[Delta]) -> None:
        deltas.extend(new)
        if new[-1].finish is not None:
            over.set()

    before = peak = anonymous_mb()
    began = time.process_time()
    engine.submit(EngineRequest("long", prompt, 0, OUTPUT), sink)
    engine.start()
    until = time.monotonic() + WITHIN_S
    while not over.wait(0.02):
        peak = max(peak, anonymous_mb())
        if time.monotonic() > until:
            raise TimeoutError(f"{tokens} tokens took more than {WITHIN_S:g} s")
    engine.stop()
    assert deltas[-1].finish == "length", deltas[-1]
    return {
        "tokens": tokens,
        "output": sum(len(delta.token_ids) for delta in deltas),
        "seconds": round(time.process_time() - began, 1),
        "kv_mb": round(runner.shape.kv_bytes_per_token * tokens / 2**20, 1),
        "peak_mb": round(peak - before, 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
