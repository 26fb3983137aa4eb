"""What of a deploy file does not fit its GPUs, and what would. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from modeling.errors import CheckpointError
from modeling.footprint import storage_of
from modeling.quantized.scheme import QuantScheme, fp8
from paceline.plan.gpus import GB, GPUS, NODE_GPUS, Gpu
from paceline.plan.memory import (
    DrafterMemory,
    DrafterModel,
    Limits,
    RankMemory,
    TargetModel,
    drafter_memory,
    rank_memory,
)

LARGEST = 64  # ranks
USUAL_FP8 = QuantScheme((fp8((128, 128), ".weight_scale_inv"),), ("lm_head", "*.in_proj_a", "*.in_proj_b"))
LEAST_TOKENS = 1024  # of KV, below which a cache is none


@dataclass(frozen=True)
class Problem:
    """what does not fit, and any one of `cures` that would make it fit."""

    what: str
    cures: tuple[str, ...]


def verifier_problems(
    target: TargetModel, limits: Limits, drafter_bytes: int, memory: RankMemory, gpu: Gpu, placement: str
) -> Iterator[Problem]:
    if placement == "STRICT_PACK" and limits.size > NODE_GPUS:
        yield Problem(
            f"verifier.tensor_parallel_size is {limits.size} and verifier.placement STRICT_PACK, but a node has "
            f"{NODE_GPUS} GPUs",
            ("verifier.placement: PACK (and a fast network between the nodes)",),
        )
    if memory.left is None or memory.left >= 0:
        return
    cures = (
        *_fewer_tokens(target, limits, drafter_bytes, gpu),
        *_more_ranks(target, limits, drafter_bytes, gpu),
        *_fp8(target, limits, drafter_bytes, gpu),
        *_other_gpus(memory, gpu),
    )
    yield Problem(
        f"a rank of the verifier needs {memory.total / GB:.1f} GB, but {gpu.name} has {gpu.memory_bytes / GB:.0f} GB",
        cures or ("more ranks, or a smaller or quantized target",),
    )


def drafter_problems(model: DrafterModel, window: int, memory: DrafterMemory, gpu: Gpu) -> Iterator[Problem]:
    if memory.left is None or memory.left >= 0:
        return
    cures = []
    if memory.context_capacity is not None and memory.context_capacity >= 1:
        cures.append(f"drafter.max_contexts: {memory.context_capacity}")
    half = drafter_memory(model, window // 2, memory.contexts // memory.context_bytes, gpu.memory_bytes)
    if half.total <= gpu.memory_bytes:
        cures.append(f"drafter.window: {window // 2} (of a drafter with full attention)")
    cures += [other.name for other in GPUS.values() if memory.total <= other.memory_bytes]
    yield Problem(
        f"a drafter needs {memory.total / GB:.1f} GB, but {gpu.name} has {gpu.memory_bytes / GB:.0f} GB", tuple(cures)
    )


def _fewer_tokens(target: TargetModel, limits: Limits, drafter_bytes: int, gpu: Gpu) -> Iterator[str]:
    tokens = _tokens(target, limits, drafter_bytes, gpu)
    if tokens >= LEAST_TOKENS:
        yield f"verifier.kv_cache_tokens: {_rounded(tokens)}"


def _more_ranks(target: TargetModel, limits: Limits, drafter_bytes: int, gpu: Gpu) -> Iterator[str]:
    """The fewest that hold the file's KV cache, and before them the fewest that hold any."""
    shown = _tokens(target, limits, drafter_bytes, gpu) >= LEAST_TOKENS
    size = limits.size * 2
    while size <= LARGEST:
        tokens = _tokens(target, replace(limits, size=size), drafter_bytes, gpu)
        if tokens >= limits.kv_cache_tokens:
            yield _ranks(size)
            return
        if tokens >= LEAST_TOKENS and not shown:
            yield f"{_ranks(size)}, verifier.kv_cache_tokens: {_rounded(tokens)}"
            shown = True
        size *= 2


def _ranks(size: int) -> str:
    return f"verifier.tensor_parallel_size: {size}" + (", verifier.placement: PACK" if size > NODE_GPUS else "")


def _fp8(target: TargetModel, limits: Limits, drafter_bytes: int, gpu: Gpu) -> Iterator[str]:
    if target.scheme is not None:
        return
    smaller = replace(target, storage=storage_of(USUAL_FP8, target.itemsize))
    if _tokens(smaller, limits, drafter_bytes, gpu) >= limits.kv_cache_tokens:
        yield "an FP8 checkpoint of the target"


def _other_gpus(memory: RankMemory, gpu: Gpu) -> Iterator[str]:
    for other in sorted(GPUS.values(), key=lambda kind: kind.memory_bytes):
        if other.memory_bytes > gpu.memory_bytes and memory.total <= other.memory_bytes:
            yield other.name
            return


def _tokens(target: TargetModel, limits: Limits, drafter_bytes: int, gpu: Gpu) -> int:
    """KV capacity in tokens under these limits; negative where not even the rest fits."""
    try:
        memory = rank_memory(target, limits, drafter_bytes, gpu.memory_bytes)
        return memory.kv_tokens(target.cache(limits.size).token_bytes) or 0
    except CheckpointError:  # so many ranks cannot divide it
        return -1


def _rounded(tokens: int) -> int:
    return tokens // LEAST_TOKENS * LEAST_TOKENS
