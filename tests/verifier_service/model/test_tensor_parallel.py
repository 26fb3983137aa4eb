"""Two ranks over gloo against the stock forward: every family, two spawned processes."""

from __future__ import annotations

import contextlib
import re
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modeling.reader import CheckpointReader
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.schedules import (
    BLOCK_TOKENS,
    BLOCKS,
    SLOTS,
    Reference,
    reference,
    schedule,
    sequences,
    worst_difference,
)
from verifier_service.model.runner import TargetRunner

FAMILIES = tuple(tiny_targets.CONFIGS)
TAPS = (0, 1)
SIZE = 2
SOCKETS_ONLY = ("qwen3_moe",)  # as ranks on two hosts would run
# Layers x KV heads of a rank x 2 x head_dim; qwen3 has one KV head, which both ranks hold.
KV_VALUES = {
    "llama": 3 * 2 * 32,
    "qwen3": 3 * 1 * 32,
    "qwen3_moe": 3 * 2 * 32,
    "qwen3_5": 2 * 32,
    "qwen3_5_moe": 2 * 32,
    "qwen3_next": 2 * 32,
    "gpt_oss": 3 * 2 * 32,
}
KV_VALUES["deepseek_v3"] = 3 * (32 + 8)  # layers x latent and rotary key, the same on every rank
REPLICATED = r"norm|embed_tokens|mlp\.gate\.|shared_expert_gate|o_proj\.bias|router|down_proj_bias|_a_proj"


def _rank(rank: int, directories: dict[str, Path], rendezvous: str, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=SIZE, timeout=timedelta(seconds=60))
    texts = sequences(3, tiny_targets.VOCABULARY, seed=2)
    for family, directory in directories.items():
        shortcut = contextlib.nullcontext() if family not in SOCKETS_ONLY else no_host_exchange()
        with shortcut:
            runner = make_runner(directory, rank)
        assert (runner._ranks.host is None) == (family in SOCKETS_ONLY)
        steps = schedule(texts, tiny_targets.VOCABULARY, seed=3)
        outputs = [runner.forward(step.plan) for step in steps]
        result: dict[str, Any] = {"bytes": runner.weight_bytes, "kv": runner.shape.kv_bytes_per_token}
        if rank == 0:
            expected = torch.load(directory / "reference.pt", weights_only=False)
            result["logits"], result["taps"] = worst_difference(outputs, steps, expected, TAPS)
        else:
            result["silent"] = all(output.logits is None and output.taps is None for output in outputs)
        torch.save(result, out / f"{family}-{rank}.pt")
    dist.destroy_process_group()


def make_runner(directory: Path, rank: int) -> TargetRunner:
    return TargetRunner(
        directory,
        rank=rank,
        size=SIZE,
        group=dist.group.WORLD,
        num_blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        num_slots=SLOTS,
        dtype=torch.float32,
        device="cpu",
        taps=TAPS,
    )


def no_host_exchange() -> Any:
    return mock.patch("modeling.parallel.open_host_exchange", return_value=None)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[tuple[str, int], dict[str, Any]]]:
    """All families, once: starting two processes costs more than running them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tensor_parallel")
    texts = sequences(3, tiny_targets.VOCABULARY, seed=2)
    directories = {}
    for family in FAMILIES:
        directories[family] = root / family
        expected: Reference = reference(tiny_targets.build(family, directories[family]), texts)
        torch.save(expected, directories[family] / "reference.pt")
    mp.spawn(_rank, args=(directories, f"file://{root}/rendezvous", root), nprocs=SIZE)
    results = {(f, r): torch.load(root / f"{f}-{r}.pt") for f in FAMILIES for r in range(SIZE)}
    return directories, results


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_have_the_stock_forwards_logits_and_taps(family, ran):
    result = ran[1][family, 0]
    assert result["logits"] < 1e-4
    assert result["taps"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_only_rank_zero_gets_logits_and_taps(family, ran):
    assert ran[1][family, 1]["silent"]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_reads_its_shard_and_the_replicated_rest_only(family, ran):
    directories, results = ran
    replicated = REPLICATED + (r"|[kv]_proj" if family == "qwen3" else "")
    whole = shared = 0
    with CheckpointReader(directories[family]) as reader:
        for name in reader.names():
            size = 4 * torch.Size(reader.shape(name)).numel()
            whole += size
            shared += size if re.search(replicated, name) else 0
    for rank in range(SIZE):
        assert results[family, rank]["bytes"] == shared + (whole - shared) // SIZE


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_caches_its_own_kv_heads_only_and_latents_in_full(family, ran):
    for rank in range(SIZE):
        assert ran[1][family, rank]["kv"] == KV_VALUES[family] * 4
