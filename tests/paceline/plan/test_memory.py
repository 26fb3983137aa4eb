"""What fits, what does not and what would: every cure that is named does cure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafter_service.fused import FusedDFlash
from drafter_service.model import DFlashModel
from drafter_service.pool import ContextPool
from modeling.dflash_config import DFlashConfig
from paceline.plan.fit import drafter_problems, verifier_problems
from paceline.plan.gpus import GPUS, gpu_named, gpu_of_bundle
from paceline.plan.memory import Limits, drafter_memory, drafter_model, rank_memory
from tests.drafter_service.pairs import HIDDEN, VOCABULARY, draft_config, second
from tests.paceline.plan.shipped import drafter_of, target_of

TINY = Path(__file__).resolve().parents[3] / "models" / "tiny" / "drafter"
H200, H100 = GPUS["H200"], GPUS["H100"]
LIMITS = Limits(
    size=8, kv_cache_tokens=65536, max_requests=64, max_step_tokens=2048, checkpoint_bytes=1 << 30, block_size=16
)


def problems(name: str, limits: Limits, gpu=H200, placement: str = "STRICT_PACK"):
    target = target_of(name)
    memory = rank_memory(target, limits, 0, gpu.memory_bytes)
    return list(verifier_problems(target, limits, 0, memory, gpu, placement))


def test_the_flagships_fit_eight_h200_in_their_packed_checkpoints():
    assert problems("qwen3.5-397b-a17b-fp8", LIMITS) == []
    assert problems("kimi-k2.5", LIMITS) == []


def test_a_cache_that_is_too_large_is_told_what_there_is_room_for():
    (problem,) = problems("qwen3-8b", replace(LIMITS, size=1, kv_cache_tokens=1 << 20))
    cure = next(cure for cure in problem.cures if cure.startswith("verifier.kv_cache_tokens: "))
    tokens = int(cure.rpartition(" ")[2])
    assert problems("qwen3-8b", replace(LIMITS, size=1, kv_cache_tokens=tokens)) == []
    assert problems("qwen3-8b", replace(LIMITS, size=1, kv_cache_tokens=tokens + 4096)) != []


def test_weights_that_are_too_large_are_told_how_many_ranks_or_what_checkpoint_would_do():
    (problem,) = problems("qwen3.5-397b-a17b", LIMITS, H100)
    assert "verifier.tensor_parallel_size: 16, verifier.placement: PACK" in problem.cures
    assert "an FP8 checkpoint of the target" in problem.cures
    assert "H200" in problem.cures
    assert problems("qwen3.5-397b-a17b", replace(LIMITS, size=16), H100, "PACK") == []
    assert problems("qwen3.5-397b-a17b-fp8", LIMITS, H100) == []


def test_a_packed_checkpoint_is_not_told_to_become_fp8():
    (problem,) = problems("kimi-k2.5", LIMITS, H100)
    assert not any("FP8" in cure for cure in problem.cures)


def test_ranks_of_one_node_are_at_most_eight():
    (problem,) = problems("qwen3.5-397b-a17b-fp8", replace(LIMITS, size=16))
    assert "a node has 8 GPUs" in problem.what
    assert problem.cures[0].startswith("verifier.placement: PACK")


def test_a_drafter_that_does_not_fit_is_told_how_many_contexts_would():
    model = drafter_of("kimi-k2.5-dflash")
    memory = drafter_memory(model, 4096, 512, GPUS["L40S"].memory_bytes)
    (problem,) = drafter_problems(model, 4096, memory, GPUS["L40S"])
    contexts = int(problem.cures[0].removeprefix("drafter.max_contexts: "))
    assert drafter_memory(model, 4096, contexts, None).total <= GPUS["L40S"].memory_bytes
    assert drafter_memory(model, 4096, contexts + 1, None).total > GPUS["L40S"].memory_bytes


def test_a_drafters_bytes_are_those_of_the_model_and_pool_that_the_service_builds():
    config = DFlashConfig.load(TINY)
    model, loaded = drafter_model(config, True, 4), DFlashModel.load(TINY, torch.float32, "cpu")
    named = {name: parameter.numel() for name, parameter in loaded.named_parameters()}
    fused = sum(count for name, count in named.items() if name.startswith(("fc.", "hidden_norm.")))
    assert model.fc == fused
    assert model.layers + model.norms == sum(named.values()) - fused
    pool = ContextPool(FusedDFlash(loaded), 3, 64)
    memory = drafter_memory(model, 64, 3, None)
    assert memory.contexts == pool.kv.nbytes + pool.positions.nbytes


def test_a_second_versions_bytes_are_those_of_all_its_weights():
    config = DFlashConfig.from_dict(draft_config(**second()), Path("drafter"))
    built = {name: parameter.numel() for name, parameter in DFlashModel(config).named_parameters()}
    model = drafter_model(config, False, 2)
    assert model.codebooks == sum(count for name, count in built.items() if name.endswith("_codebook"))
    assert model.bytes == 2 * (sum(built.values()) - model.fc + 2 * VOCABULARY * HIDDEN)


def test_a_tied_head_is_held_once():
    tied, untied = (drafter_of("qwen3-4b-dflash", tied=tied) for tied in (True, False))
    assert untied.bytes - tied.bytes == 151936 * 2560 * 2


def test_a_bundle_names_its_gpu_type_as_ray_does():
    assert gpu_of_bundle({"GPU": 1, "accelerator_type:H200": 0.001}) == "H200"
    assert gpu_of_bundle({"GPU": 1}) is None
    assert gpu_named("--gpu", "a100-80g") is GPUS["A100"]


def test_every_gpu_type_says_where_its_figures_are_from():
    assert all("nvidia" in gpu.source.lower() for gpu in GPUS.values())
    with pytest.raises(Exception, match="--gpu is 'T4', of which nothing is known: choose one of H200"):
        gpu_named("--gpu", "T4")
