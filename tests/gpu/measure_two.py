"""Check and time what takes two processes: a target on two tensor-parallel ranks, and a link with its tensor plane.

python -m tests.gpu.measure_two OUT      writes OUT/two.json; exit status 1 if a result is wrong, 3 without a GPU

With one GPU both processes use it, and take each other for other machines' so that NCCL joins them over sockets: that
checks the code, and times nothing that two GPUs would do. With two GPUs or more, each has its own.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.link.face import VerifierLink
from cluster.link.messages import DraftAsk, Piece
from tests.cluster.link.echo import Echo, connect, serve
from tests.gpu.measure_kernels import NO_DEVICE, circumstances, copy_bandwidth, why_not
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.runner import TargetRunner
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

ROOT = Path(__file__).resolve().parents[2]
SIZE, WAIT_S, BLOCK_TOKENS = 2, 120.0, 16
BUSY_CYCLES = 4 * 10**9  # seconds of a GPU's time
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit


@dataclass(frozen=True)
class Task:
    """prompt, steps: tokens of the prompt, and verify steps after it. rows, hidden, sends: of the link's features."""

    target: str
    device: str
    dtype: torch.dtype
    prompt: int = 256
    steps: int = 50
    rows: int = 512
    hidden: int = 4096
    sends: int = 50


def main(arguments: list[str]) -> int:
    if (reason := why_not()) is not None:
        print(f"cannot check two processes: {reason}", file=sys.stderr)
        return NO_DEVICE
    if len(arguments) != 1:
        print("usage: python -m tests.gpu.measure_two OUT", file=sys.stderr)
        return 2
    found = measure(Task(str(ROOT / "models" / "tiny" / "target"), "cuda", torch.bfloat16))
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    record = {**circumstances(copy_bandwidth()), "gpus": torch.cuda.device_count(), **found}
    (out / "two.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0 if found["passed"] else 1


def measure(task: Task) -> dict[str, Any]:
    """Both processes' findings; raises what one of them raised."""
    with tempfile.TemporaryDirectory() as room:
        mp.spawn(_process, (task, room), nprocs=SIZE)
        found = json.loads((Path(room) / "found.json").read_text())
    right = found["worst_logit"] <= TOLERANCE[task.dtype] * found["largest_logit"]
    found["passed"] = right and found["link_right"] and found["link_beside"] is not False
    return found


def _process(rank: int, task: Task, room: str) -> None:
    torch.set_num_threads(1)
    if task.device == "cuda":
        _meet_nccl(rank)
    backend = "gloo" if task.device == "cpu" else "cpu:gloo,cuda:nccl"
    rendezvous = f"file://{room}/rendezvous"
    dist.init_process_group(
        backend, init_method=rendezvous, rank=rank, world_size=SIZE, timeout=timedelta(seconds=WAIT_S)
    )
    found = {**_two_ranks(rank, task), **_link(rank, task, Path(room))}
    if rank == 0:
        (Path(room) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _meet_nccl(rank: int) -> None:
    """Before the first use of NCCL: it refuses two ranks on one GPU unless they seem to be on different hosts."""
    torch.cuda.set_device(rank % torch.cuda.device_count())
    if torch.cuda.device_count() == 1:
        os.environ |= {"NCCL_HOSTID": f"paceline-{rank}", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
        os.environ |= {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}


def _two_ranks(rank: int, task: Task) -> dict[str, Any]:
    """The same plans on two ranks, and on rank 0 alone."""
    together, seconds = _logits(task, rank=rank, size=SIZE, group=dist.group.WORLD)
    if rank > 0:
        return {}
    alone, alone_seconds = _logits(task)
    pairs = list(zip(together, alone, strict=True))
    return {
        "worst_logit": max(float((own - right).abs().max()) for own, right in pairs),
        "largest_logit": max(float(right.abs().max()) for right in alone),
        "step_seconds": statistics.median(seconds[1:]),
        "step_seconds_alone": statistics.median(alone_seconds[1:]),
    }


def _logits(task: Task, **ranks: Any) -> tuple[list[torch.Tensor], list[float]]:
    runner = TargetRunner(
        task.target,
        num_blocks=_blocks(task),
        block_tokens=BLOCK_TOKENS,
        num_slots=2,
        dtype=task.dtype,
        device=task.device,
        kernel_path=KernelPath("triton", longest_row=4),
        **ranks,
    )
    outputs: list[torch.Tensor] = []
    seconds: list[float] = []
    for plan in _plans(task):
        began = time.perf_counter()
        logits = runner.forward(plan).logits
        if task.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        if logits is not None and len(outputs) < 8:
            outputs.append(logits.float().cpu())
    return outputs, seconds


def _plans(task: Task) -> list[StepPlan]:
    """A prompt, then verifies of four tokens of which the first stays."""
    blocks = tuple((0, block) for block in range(_blocks(task)))
    prompt = tuple(3 + index % 50 for index in range(task.prompt))
    plans = [StepPlan(1, new_blocks=blocks, prefill=(PrefillChunk(0, 0, prompt, completes_prompt=True),))]
    for step in range(task.steps):
        row = VerifyRow(0, task.prompt + step, (5, 6, 7, 8 + step % 40))
        plans.append(StepPlan(2 + step, verify=(row,), decided=((0, 1),) if step else ()))
    return plans


def _blocks(task: Task) -> int:
    return -(-(task.prompt + task.steps + 4) // BLOCK_TOKENS)


def _link(rank: int, task: Task, room: Path) -> dict[str, Any]:
    """Features from rank 1 to rank 0 over the torch tensor plane: NCCL, or gloo on a CPU."""
    address = room / "address"
    if rank == 0:
        handler = Echo()
        server = serve(handler, device=task.device, heartbeat_s=0.5, hard_deadline_s=WAIT_S)
        address.with_suffix(".part").write_text(server.address)
        address.with_suffix(".part").rename(address)
        dist.barrier()  # all was sent and asked for
        beside = _answered_beside_work(task)
        rows = handler.rows("v/r/0").float().cpu()
        server.stop()
        want = torch.arange(task.sends + 1).repeat_interleave(task.rows).float()
        seconds = torch.zeros(1)
        dist.recv(seconds, 1)
        size = task.sends * task.rows * task.hidden * torch.finfo(task.dtype).bits // 8
        right = torch.equal(rows[:, 0], want) and torch.equal(rows[:, -1], want)
        return {
            "link_beside": beside,
            "link_right": right,
            "link_seconds": float(seconds),
            "link_gb_s": size / float(seconds) / 1e9,
        }
    deadline = time.monotonic() + WAIT_S
    while not address.exists():
        assert time.monotonic() < deadline, "rank 0 never opened its end of the link"
        time.sleep(0.01)
    link = connect(
        address.read_text(),
        hidden=task.hidden,
        dtype=str(task.dtype).removeprefix("torch."),
        tensor_transport="torch",
        device=task.device,
        heartbeat_s=0.5,
        hard_deadline_s=WAIT_S,
    )
    while not link.state.linked:
        assert time.monotonic() < deadline, "the link was never joined"
        time.sleep(0.01)
    features = torch.empty(task.rows, task.hidden, dtype=task.dtype, device=task.device)
    began = time.perf_counter()
    for send in range(task.sends):
        _send(link, task, send, features)
    seconds = torch.tensor([time.perf_counter() - began])
    dist.barrier()
    dist.barrier()  # the other end's device is busy
    _send(link, task, task.sends, features)
    dist.barrier()
    dist.send(seconds, 0)
    link.stop()
    return {}


def _send(link: VerifierLink, task: Task, number: int, features: torch.Tensor) -> None:
    link.append([Piece("v/r/0", number * task.rows, task.rows)], features.fill_(number))
    ask = DraftAsk("v/r/0", (number + 1) * task.rows, 7, 2)
    link.ask([ask])
    assert link.collect([ask], WAIT_S), "no answer came over the link"


def _answered_beside_work(task: Task) -> bool | None:
    """Whether features arrive, and are answered, while this end's device still computes; None on a CPU."""
    if task.device == "cuda":
        torch.cuda._sleep(BUSY_CYCLES)
    dist.barrier()
    dist.barrier()  # all was answered
    return None if task.device == "cpu" else not torch.cuda.default_stream().query()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
