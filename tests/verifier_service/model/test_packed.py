"""Packed checkpoints in their published layouts against the stock forward over the same dequantized weights."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from modeling.errors import CheckpointError
from modeling.quantized.scheme import scheme_of
from modeling.target_config import read_target_config
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.packed_targets import TARGETS
from tests.verifier_service.model.schedules import (
    BLOCK_TOKENS,
    BLOCKS,
    SLOTS,
    reference,
    schedule,
    sequences,
    worst_difference,
)
from verifier_service.model.runner import TargetRunner

SIZE = 2
Built = dict[str, Path]


def make_runner(directory: Path, **overrides: Any) -> TargetRunner:
    settings: dict[str, Any] = {"num_blocks": BLOCKS, "block_tokens": BLOCK_TOKENS, "num_slots": SLOTS}
    return TargetRunner(directory, **{**settings, "dtype": torch.float32, "device": "cpu", **overrides})


def difference(runner: TargetRunner, directory: Path, first: bool = True) -> float:
    """Largest difference of logits from the stock ones, over a random schedule."""
    steps = schedule(sequences(3, tiny_targets.VOCABULARY, seed=2), tiny_targets.VOCABULARY, seed=3)
    outputs = [runner.forward(step.plan) for step in steps]
    expected = torch.load(directory / "reference.pt", weights_only=False)
    return worst_difference(outputs, steps, expected, ())[0] if first else 0.0


def _rank(rank: int, built: Built, rendezvous: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    result = {}
    for name, directory in built.items():
        runner = make_runner(directory, rank=rank, size=SIZE, group=dist.group.WORLD)
        result[name] = difference(runner, directory, rank == 0), runner.weight_bytes
    torch.save(result, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    torch.set_num_threads(1)
    texts = sequences(3, tiny_targets.VOCABULARY, seed=2)
    directories = {}
    for name, target in TARGETS.items():
        directories[name] = tmp_path_factory.mktemp("packed")
        torch.save(reference(target.build(directories[name]), texts), directories[name] / "reference.pt")
    return directories


@pytest.fixture(scope="module")
def two_ranks(built: Built, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[float, int]]]:
    """Of each rank, by target: difference of logits (rank 0) and bytes of weights."""
    root = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(built, f"file://{root}/rendezvous", root), nprocs=SIZE)
    return [torch.load(root / f"{rank}.pt") for rank in range(SIZE)]


@pytest.mark.parametrize("name", TARGETS)
def test_one_rank_has_the_stock_forwards_logits(name, built):
    assert difference(make_runner(built[name]), built[name]) < 1e-4


@pytest.mark.parametrize("name", TARGETS)
def test_two_ranks_have_the_stock_forwards_logits(name, two_ranks):
    assert two_ranks[0][name][0] < 1e-4


@pytest.mark.parametrize("name", TARGETS)
def test_two_ranks_hold_little_more_than_one(name, built, two_ranks):
    """A few scales and what is replicated; dequantized weights would be several times as much."""
    assert sum(ranks[name][1] for ranks in two_ranks) < 1.6 * make_runner(built[name]).weight_bytes


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"fp8 deepseek_v3"}))  # whose kv_b_proj is dequantized
def test_a_rank_holds_the_packed_bytes_that_the_scheme_counts(name, built):
    scheme = scheme_of(read_target_config(built[name]))
    assert scheme is not None
    shapes = {key: tuple(x.shape) for key, x in tiny_targets.make(TARGETS[name].family).state_dict().items()}
    counted = sum(scheme.bytes(key.removeprefix("model."), shape, 4) for key, shape in shapes.items())
    assert make_runner(built[name]).weight_bytes == pytest.approx(counted, rel=1e-3)  # gate and up scaled apart


def copy_of(directory: Path, to: Path) -> dict[str, torch.Tensor]:
    shutil.copy(directory / "config.json", to / "config.json")
    return load_file(directory / "model.safetensors")


def test_a_missing_scale_is_named(built, tmp_path):
    tensors = copy_of(built["int4 kimi"], tmp_path)
    del tensors["language_model.model.layers.1.mlp.experts.0.gate_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has .*weight_packed \(INT4\) but not .*experts\.0\.gate_proj\.weight_sc"
    ):
        make_runner(tmp_path)


def test_a_missing_expert_is_named(built, tmp_path):
    tensors = copy_of(built["nvfp4 qwen3_5_moe"], tmp_path)
    kept = {name: tensor for name, tensor in tensors.items() if ".2.mlp.experts.5.up_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor '.*layers\.2\.mlp\.experts\.5\.up_proj\.weight_packed'"):
        make_runner(tmp_path)


def test_a_tensor_that_nobody_takes_is_named(built, tmp_path):
    tensors = copy_of(built["fp8 qwen3"], tmp_path)
    tensors["model.layers.1.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has 1 tensors that qwen3 has no use for .*1\.self_attn\.sinks"):
        make_runner(tmp_path)


def test_codes_without_a_quantization_config_are_refused(built, tmp_path):
    tensors = copy_of(built["fp8 qwen3"], tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is packed \(F8_E4M3\), and quantization_config .* does not say how"):
        make_runner(tmp_path)
