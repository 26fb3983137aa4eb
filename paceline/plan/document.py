"""The plan of a deploy file as one value: what `--json` writes and `show` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deploy.config import Application
from modeling.footprint import CacheFootprint, Part, active_parameters, routed_experts
from modeling.kv_dtype import DTYPE_BYTES
from paceline.plan.fit import Problem, drafter_problems, verifier_problems
from paceline.plan.memory import DrafterMemory, Limits, RankMemory, drafter_memory, rank_memory
from paceline.plan.notes import notes
from paceline.plan.pool import Load, Pair, Workload
from paceline.plan.pricing import draft_times, target_times
from paceline.plan.reading import Draft, Inputs, Source
from paceline.plan.timing import acceptance_rate

USUAL_ACCEPTANCE = 4.0  # tokens a step with whole blocks, of a drafter that suits its traffic
CONCURRENCY = (1, 4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Assumed:
    """Of the requests. acceptance: tokens a step with whole blocks (None = USUAL_ACCEPTANCE, or half a block);
    concurrency: running requests of one verifier (empty = CONCURRENCY up to max_requests).
    """

    acceptance: float | None = None
    context: int = 4096
    concurrency: tuple[int, ...] = ()


@dataclass(frozen=True)
class Group:
    """Processes that start together. bundle: what Ray reserves for each of `processes` beside its front."""

    name: str
    replicas: int
    processes: int
    gpus: int
    bundle: dict[str, float]
    placement: str


@dataclass(frozen=True)
class TargetPlan:
    source: Source
    packing: str
    size: int
    parameters: int
    active_parameters: int
    parts: tuple[Part, ...]
    cache: CacheFootprint
    memory: RankMemory
    kv_capacity: int | None  # tokens that the memory would hold
    kv_cache_tokens: int  # tokens that the file asks for
    gpu: str | None


@dataclass(frozen=True)
class DraftPlan:
    """memory: of one drafter; None where it lives inside the verifier's first rank. parts: parameters."""

    source: Source
    block_size: int
    window: int
    parts: dict[str, int]
    row_bytes: int
    context_bytes: int
    memory: DrafterMemory
    context_capacity: int | None
    max_contexts: int
    gpu: str | None
    remote: bool


@dataclass(frozen=True)
class LinkPlan:
    """token_bytes: of a token's fused features. prefill_step_bytes: of a step that is all prefill."""

    dtype: str
    token_bytes: int
    raw_tap_bytes: int
    prefill_step_bytes: int


@dataclass(frozen=True)
class Plan:
    """fits: no problem was found. loads are empty where seconds are unknown or nothing is drafted. priced: what seconds
    of steps and drafts are from.
    """

    file: str
    model_name: str
    fits: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    groups: tuple[Group, ...]
    target: TargetPlan
    drafter: DraftPlan | None
    link: LinkPlan | None
    acceptance: float
    context: int
    loads: tuple[Load, ...]
    priced: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values; properties that people ask for included."""
        plain = asdict(self)
        for load, row in zip(self.loads, plain["loads"]):
            row["tokens_per_s"] = load.tokens_per_s
            if self.link is not None:
                row["link_bytes_per_step"] = link_bytes_per_step(self.link, load)
                row["link_bytes_per_s"] = row["link_bytes_per_step"] / load.step.seconds
        return plain


def link_bytes_per_step(link: LinkPlan, load: Load) -> float:
    """Features of the tokens that one decode step commits, if it drafts; drafts themselves are some bytes a token."""
    return load.requests * load.step.committed * link.token_bytes if load.step.drafts else 0.0


def make_plan(file: str, inputs: Inputs, assumed: Assumed) -> Plan:
    """Raises ValueError for an acceptance length that the drafter's block cannot give."""
    application, draft = inputs.application, inputs.draft
    verifier = application.verifier
    drafter_bytes = _beside_the_target(draft, application)
    available = None if inputs.gpu is None else inputs.gpu.memory_bytes
    limits = _limits(inputs, drafter_bytes, available)
    memory = rank_memory(inputs.target, limits, drafter_bytes, available)
    target = _target_plan(inputs, limits, memory)
    drafter = None if draft is None else _draft_plan(draft, application)
    problems: list[Problem] = []
    if inputs.gpu is not None:
        problems += verifier_problems(inputs.target, limits, drafter_bytes, memory, inputs.gpu, verifier.placement)
    if draft is not None and drafter is not None and drafter.remote and draft.gpu is not None:
        problems += drafter_problems(draft.model, draft.window, drafter.memory, draft.gpu)
    block = draft.model.block_size if draft is not None else 1
    acceptance = assumed.acceptance or min(USUAL_ACCEPTANCE, max(1.0, block / 2))
    return Plan(
        file=file,
        model_name=application.model_name,
        fits=not problems,
        problems=tuple(problems),
        notes=tuple(notes(inputs, limits.kv_cache_tokens, target.kv_capacity)),
        groups=tuple(_groups(application)),
        target=target,
        drafter=drafter,
        link=_link(application, draft),
        acceptance=acceptance,
        context=assumed.context,
        loads=() if draft is None else _loads(inputs, draft, acceptance, assumed),
        priced=() if draft is None else _priced(inputs, draft),
    )


def _limits(inputs: Inputs, drafter_bytes: int, available: int | None) -> Limits:
    verifier, draft = inputs.application.verifier, inputs.draft
    most = verifier.speculation.max_draft_tokens
    block = 1 if draft is None else draft.model.block_size if most is None else min(most + 1, draft.model.block_size)
    tokens = verifier.kv_cache_tokens
    limits = Limits(
        size=verifier.tensor_parallel_size,
        kv_cache_tokens=0 if tokens == "auto" else tokens,
        max_requests=verifier.max_requests,
        max_step_tokens=verifier.max_step_tokens,
        checkpoint_bytes=verifier.checkpoint_bytes if verifier.prefix_cache else 0,
        block_size=block,
    )
    if tokens != "auto" or available is None:
        return limits
    room = rank_memory(inputs.target, limits, drafter_bytes, int(verifier.memory_share * available))
    return replace(limits, kv_cache_tokens=max(0, room.kv_tokens(inputs.target.cache(limits.size).token_bytes) or 0))


def _beside_the_target(draft: Draft | None, application: Application) -> int:
    """What the verifier's first rank holds of the drafter: fc, or all of it."""
    if draft is None:
        return 0
    if application.drafts_remotely:
        return draft.model.fuser_bytes
    whole = drafter_memory(draft.model, draft.window, draft.contexts, None)
    return draft.model.fuser_bytes + whole.weights + whole.contexts


def _target_plan(inputs: Inputs, limits: Limits, memory: RankMemory) -> TargetPlan:
    parts, cache = inputs.target.parts(limits.size), inputs.target.cache(limits.size)
    return TargetPlan(
        source=inputs.source,
        packing=inputs.target.packing,
        size=limits.size,
        parameters=sum(part.parameters for part in parts),
        active_parameters=active_parameters(parts, routed_experts(inputs.target.config)),
        parts=parts,
        cache=cache,
        memory=memory,
        kv_capacity=memory.kv_tokens(cache.token_bytes),
        kv_cache_tokens=limits.kv_cache_tokens,
        gpu=inputs.gpu.name if inputs.gpu is not None else None,
    )


def _draft_plan(draft: Draft, application: Application) -> DraftPlan:
    model, remote = draft.model, application.drafts_remotely
    available = draft.gpu.memory_bytes if remote and draft.gpu is not None else None
    memory = drafter_memory(model, draft.window, draft.contexts, available)
    return DraftPlan(
        source=draft.source,
        block_size=model.block_size,
        window=draft.window,
        parts={
            "layers": model.layers,
            "norms": model.norms,
            "fc": model.fc,
            "embedding": model.embedding,
            "head": 0 if model.tied else model.head,
        }
        | ({"codebooks": model.codebooks} if model.codebooks else {}),
        row_bytes=model.row_bytes,
        context_bytes=memory.context_bytes,
        memory=memory,
        context_capacity=memory.context_capacity,
        max_contexts=draft.contexts,
        gpu=draft.gpu.name if draft.gpu is not None else None,
        remote=remote,
    )


def _groups(application: Application) -> list[Group]:
    router, verifier, drafter = application.router, application.verifier, application.drafter
    groups = [
        Group("router", router.replicas, 1, 0, {"CPU": router.front_cpus}, "any node"),
        _group("verifier", verifier.replicas, verifier.bundles[1:], verifier.placement),
    ]
    if application.drafts_remotely and drafter is not None:
        groups.append(_group("drafter", drafter.replicas, drafter.bundles[1:], "STRICT_PACK"))
    return groups


def _group(name: str, replicas: int, bundles: Sequence[dict[str, float]], placement: str) -> Group:
    gpus = sum(round(bundle.get("GPU", 0)) for bundle in bundles)
    return Group(name, replicas, len(bundles), gpus, bundles[0], placement)


def _link(application: Application, draft: Draft | None) -> LinkPlan | None:
    if draft is None or not application.drafts_remotely:
        return None
    verifier = application.verifier
    token = draft.config.hidden * DTYPE_BYTES[verifier.link.dtype]
    return LinkPlan(
        dtype=verifier.link.dtype,
        token_bytes=token,
        raw_tap_bytes=token * len(draft.config.target_layer_ids),
        prefill_step_bytes=verifier.max_step_tokens * token,
    )


def _priced(inputs: Inputs, draft: Draft) -> tuple[str, ...]:
    times = (("steps", target_times(inputs)), ("drafts", draft_times(draft)))
    return tuple(f"{what} {found.title}" for what, found in times if found is not None)


def _loads(inputs: Inputs, draft: Draft, acceptance: float, assumed: Assumed) -> tuple[Load, ...]:
    target, own = target_times(inputs), draft_times(draft)
    if target is None or own is None:
        return ()
    most = inputs.application.verifier.speculation.max_draft_tokens
    block = draft.model.block_size
    work = Workload(
        rate=acceptance_rate(acceptance, block),
        context=assumed.context,
        attended=min(assumed.context, draft.window),
        window=draft.window,
        most_drafts=block - 1 if most is None else min(most, block - 1),
    )
    largest = inputs.application.verifier.max_requests
    usual = sorted({*(number for number in CONCURRENCY if number < largest), largest})
    return Pair(target, draft.model, own, work).loads(assumed.concurrency or usual)
