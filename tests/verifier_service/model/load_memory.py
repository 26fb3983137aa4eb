"""Measures what a rank's memory peaks at while it loads: `python -m tests.verifier_service.model.load_memory`.

Writes a checkpoint, loads it on two ranks in fresh processes and watches their anonymous memory from outside. Pages of
the mapped checkpoint are not counted: the kernel takes them back when it needs them.
"""

from __future__ import annotations

import json
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
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from verifier_service.model.runner import TargetRunner

SIZE = 2
MB = 2**20
PERIOD_S = 0.005


@dataclass(frozen=True)
class Measured:
    """Of one rank, in bytes: its weights; peak and end of anonymous memory, less what it had before loading."""

    shard: int
    peak: int
    after: int


def write_checkpoint(directory: Path, *, layers: int, experts: int, packed: bool) -> int:
    """A Qwen3-MoE of random bits, in fine-grained FP8 or bf16, with an expert of 1.5 million weights. Returns bytes."""
    dimensions: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "moe_intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_experts": experts,
        "num_experts_per_tok": 8,
    }
    config = Qwen3MoeConfig(**dimensions)
    settings = config.to_dict()
    if packed:
        settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in AutoModelForCausalLM.from_config(config).state_dict().items()}
    for layer in [*range(layers), None]:
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in shapes.items():
            if name.startswith(f"model.layers.{layer}.") if layer is not None else ".layers." not in name:
                tensors |= _published(name, tuple(shape), packed)
        save_file(tensors, directory / f"model-{layer}.safetensors")
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def measure(directory: Path) -> list[Measured]:
    """Loads the checkpoint on SIZE fresh processes. Raises RuntimeError if one of them fails."""
    with tempfile.TemporaryDirectory() as scratch:
        notes = Path(scratch)
        context = mp.spawn(_load, args=(directory, f"file://{notes}/meet", notes), nprocs=SIZE, join=False)
        peaks = [0] * SIZE
        while not context.join(timeout=PERIOD_S):
            for rank, process in enumerate(context.processes):
                if (notes / f"begun-{rank}").exists():
                    peaks[rank] = max(peaks[rank], _anonymous(str(process.pid)))
        found = []
        for rank in range(SIZE):
            before = int((notes / f"begun-{rank}").read_text())
            shard, after = json.loads((notes / f"done-{rank}").read_text())
            found.append(Measured(shard, max(peaks[rank], after) - before, after - before))
        return found


def _load(rank: int, directory: Path, rendezvous: str, notes: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    part = notes / f"begun-{rank}.part"
    part.write_text(str(_anonymous("self")))
    part.rename(notes / f"begun-{rank}")
    runner = TargetRunner(
        directory,
        rank=rank,
        size=SIZE,
        group=dist.group.WORLD,
        num_blocks=4,
        block_tokens=4,
        num_slots=1,
        dtype=torch.bfloat16,
        device="cpu",
    )
    (notes / f"done-{rank}").write_text(json.dumps([runner.weight_bytes, _anonymous("self")]))
    dist.destroy_process_group()


def _anonymous(pid: str) -> int:
    """Bytes of anonymous memory of a process, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _published(name: str, shape: tuple[int, ...], packed: bool) -> dict[str, torch.Tensor]:
    prefix, _, kind = name.partition(".experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
    if parts is not None:
        one: tuple[int, ...] = (shape[1] // len(parts), shape[2])
        names = [f"{prefix}.experts.{expert}.{part}.weight" for expert in range(shape[0]) for part in parts]
    else:
        one, names = shape, [name]
    stored: dict[str, torch.Tensor] = {}
    for each in names:
        if packed and each.endswith("_proj.weight"):
            codes = torch.randint(0, 120, one, dtype=torch.uint8)
            stored[each] = codes.view(torch.float8_e4m3fn)
            stored[each + "_scale_inv"] = torch.full((-(-one[0] // 128), -(-one[1] // 128)), 1e-3)
        else:
            stored[each] = torch.full(one, 0.01, dtype=torch.bfloat16)
    return stored


def main() -> None:
    layers, experts = (int(argument) for argument in (sys.argv[1:] or ["6", "64"]))
    for packed in (True, False):
        with tempfile.TemporaryDirectory() as scratch:
            size = write_checkpoint(Path(scratch), layers=layers, experts=experts, packed=packed)
            begun = time.monotonic()
            for rank, found in enumerate(measure(Path(scratch))):
                print(
                    f"{'fp8' if packed else 'bf16'} checkpoint of {size / MB:.0f} MB, rank {rank}: shard "
                    f"{found.shard / MB:.0f} MB, peak {found.peak / MB:.0f} MB, then {found.after / MB:.0f} MB",
                    flush=True,
                )
            print(f"{time.monotonic() - begun:.1f} s with the processes' start", flush=True)


if __name__ == "__main__":
    main()
