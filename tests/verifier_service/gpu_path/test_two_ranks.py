"""Two ranks over gloo, each over kernels, say together what the stock forward says."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.verifier_service.gpu_path.tiny import TinyTarget, build

SIZE = 2
STEPS = 4


def _rank(rank: int, target: TinyTarget, rendezvous: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=SIZE, timeout=timedelta(seconds=120))
    runner = target.runner(rank=rank, size=SIZE, group=dist.group.WORLD)
    outputs = [runner.forward(step.plan) for step in target.steps[:STEPS]]
    if rank == 0:
        torch.save([output.logits for output in outputs], out)
    assert rank == 0 or all(output.logits is None for output in outputs)
    dist.destroy_process_group()


def test_two_ranks_have_the_stock_forwards_logits(tmp_path):
    target = build("qwen3", tmp_path / "target")
    out = tmp_path / "logits.pt"
    mp.spawn(_rank, (target, f"file://{tmp_path}/rendezvous", out), nprocs=SIZE)
    checked = 0
    for step, logits in zip(target.steps, torch.load(out)):
        for cell in step.logits:
            want = target.expected.logits[cell.sequence][cell.position]
            torch.testing.assert_close(logits[cell.row], want, rtol=1e-4, atol=1e-4)
            checked += 1
    assert checked > 5
