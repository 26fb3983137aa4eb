"""One rank of a verifier, from settings to the end of its life. Rank 0 also holds the engine, its port and the link."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from cluster.contracts import EngineInfo
from cluster.errors import ConfigError
from cluster.link.face import VerifierLink
from cluster.tls import Access
from modeling.device_memory import LINK_BYTES
from modeling.dflash import FeatureFuser
from modeling.dflash_config import DFlashConfig
from modeling.kernel_choice import wants_triton
from modeling.target_config import read_target_config, target_fingerprint
from verifier_service.config import VerifierSettings
from verifier_service.control import SpeculationControl
from verifier_service.engine import Engine, follow
from verifier_service.features import FeatureStore
from verifier_service.fit import check_fit
from verifier_service.grammar.compiler import GrammarCompiler
from verifier_service.loading_log import log_progress
from verifier_service.model.kernel_path import KernelPath
from verifier_service.model.memory_room import MemoryLimits
from verifier_service.model.runner import TargetRunner
from verifier_service.packing import PlanChannel
from verifier_service.port import EnginePort
from verifier_service.proposers.face import Proposer
from verifier_service.proposers.linked import LinkProposer
from verifier_service.proposers.plain import NoProposer
from verifier_service.rank_group import joined_ranks
from verifier_service.recorder import FlightRecorder, FlightTarget
from verifier_service.scheduler import SchedulerLimits
from verifier_service.settled import settled
from verifier_service.step_tables.prior import read_prior
from verifier_service.warm_up import warm_up

log = logging.getLogger(__name__)


class MakeLink(Protocol):
    """Builds rank 0's end of the link: remote, or to a drafter in this process. Chosen by the composition root."""

    def __call__(
        self,
        settings: VerifierSettings,
        fuser: FeatureFuser,
        *,
        verifier_id: str,
        target_fingerprint: str,
        vocabulary: int,
    ) -> VerifierLink: ...


def run_rank(
    settings: VerifierSettings,
    rank: int,
    rendezvous: str,
    *,
    engine_id: str,
    host: str,
    make_link: MakeLink | None,
    on_ready: Callable[[str], None],
) -> None:
    """Blocks until the rank's life is over; returns after a stop, raises whatever ended it.

    rendezvous: "host:port" on rank 0's machine, free; unused for a single rank. host: where rank 0 opens the engine
    port. make_link: needed on rank 0 unless speculation.mode is "none". on_ready("host:port" of the engine port) is
    called once all ranks are loaded, with "" on ranks other than 0. Raises ConfigError before anything is loaded,
    RankFailedError if another rank cannot start.
    """
    torch.set_num_threads(settings.threads_per_rank)
    check_fit(settings)
    with joined_ranks(settings.tensor_parallel_size, settings.device, rank, rendezvous) as ranks:
        runner = build_runner(settings, rank, ranks.group)
        if settings.device == "cuda" and wants_triton(settings.kernels, settings.device):
            warm_up(runner, _limits(settings, runner.shape.blocks), _kernel_path(settings).longest_row)
        channel = PlanChannel(ranks.group)
        engine = build_engine(settings, runner, channel, engine_id, make_link) if rank == 0 else None
        ranks.meet()
        with settled():
            if engine is not None:
                _serve(engine, host, settings.link.access, on_ready)
            else:
                on_ready("")
                follow(runner, channel)


def build_runner(settings: VerifierSettings, rank: int = 0, group: Any = None) -> TargetRunner:
    """One rank's target, loaded. group: None for a single rank. Raises CheckpointError as TargetRunner does."""
    tokens = settings.kv_cache_tokens
    return TargetRunner(
        settings.target,
        rank=rank,
        size=settings.tensor_parallel_size,
        group=group,
        num_blocks=None if tokens == "auto" else tokens // settings.block_tokens,
        block_tokens=settings.block_tokens,
        num_slots=settings.max_requests,
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
        kv_dtype=settings.kv_dtype,
        max_context=settings.max_context,
        deterministic=settings.deterministic,
        progress=log_progress(log) if rank == 0 else None,
        kernel_path=_kernel_path(settings),
        memory=MemoryLimits(
            settings.memory_share, settings.max_step_tokens, _later_bytes(settings) if rank == 0 else 0
        ),
        checkpoint_bytes=settings.checkpoint_bytes if settings.prefix_cache else 0,
    )


def _kernel_path(settings: VerifierSettings) -> KernelPath:
    if settings.speculation.mode == "none" or settings.drafter is None:
        return KernelPath(settings.kernels, longest_row=1)
    drafter = DFlashConfig.load(settings.drafter)
    return KernelPath(
        settings.kernels,
        longest_row=drafter.block_size,
        max_rows=settings.max_step_tokens,
        taps=tuple(drafter.target_layer_ids),
    )


def _later_bytes(settings: VerifierSettings) -> int:
    """What rank 0 takes of its device after its model: the fuser of its taps, and the link's communicator."""
    if settings.speculation.mode == "none" or settings.drafter is None:
        return 0
    drafter = DFlashConfig.load(settings.drafter)
    fuser = drafter.hidden * (len(drafter.target_layer_ids) * drafter.hidden + 1)
    link = LINK_BYTES if settings.link.tensor_transport == "torch" else 0
    return fuser * getattr(torch, settings.dtype).itemsize + link


def build_engine(
    settings: VerifierSettings,
    runner: TargetRunner,
    channel: PlanChannel | None,
    engine_id: str,
    make_link: MakeLink | None,
) -> Engine:
    """Rank 0's engine over a loaded runner, with its proposer and link."""
    fingerprint = target_fingerprint(settings.target)
    make_proposer: Callable[[], Proposer] = NoProposer
    block_size = 1
    if settings.speculation.mode != "none":
        assert make_link is not None, "rank 0 needs a link to draft"
        assert settings.drafter is not None, "settings without a drafter are refused when they are read"
        fuser = FeatureFuser.load(settings.drafter, getattr(torch, settings.dtype), settings.device)
        block_size = fuser.block_size
        make_proposer = partial(_proposer, settings, fuser, make_link, engine_id, fingerprint, runner.shape.vocabulary)
    limits = _limits(settings, runner.shape.blocks)
    info = EngineInfo(
        engine_id=engine_id,
        target_fingerprint=fingerprint,
        max_context=min(runner.shape.max_context, limits.blocks * limits.block_tokens),
        vocabulary=runner.shape.vocabulary,
        max_requests=settings.max_requests,
        block_size=block_size,
    )
    return Engine(
        runner,
        limits,
        info,
        proposer=make_proposer(),
        make_proposer=make_proposer,
        channel=channel,
        recorder=_recorder(settings, engine_id, fingerprint),
        grammars=_grammars(settings.target, runner.shape.vocabulary),
    )


def _recorder(settings: VerifierSettings, engine_id: str, fingerprint: str) -> FlightRecorder | None:
    if settings.flight_recorder is None:
        return None
    target = FlightTarget(
        str(Path(settings.target).absolute()),
        fingerprint,
        settings.dtype,
        settings.tensor_parallel_size,
        settings.block_tokens,
        settings.kv_dtype,
        settings.deterministic,
    )
    return FlightRecorder(settings.flight_recorder, engine_id, target)


def _grammars(target: str, vocabulary: int) -> GrammarCompiler | None:
    """None for a target whose tokenizer is not there or not of a kind that grammars can use."""
    try:
        return GrammarCompiler.load(target, vocabulary)
    except ConfigError as error:
        log.warning("requests with a grammar will be refused: %s", error)
        return None


def _proposer(
    settings: VerifierSettings,
    fuser: FeatureFuser,
    make_link: MakeLink,
    engine_id: str,
    fingerprint: str,
    vocabulary: int,
) -> LinkProposer:
    speculation = settings.speculation
    return LinkProposer(
        make_link(settings, fuser, verifier_id=engine_id, target_fingerprint=fingerprint, vocabulary=vocabulary),
        fuser,
        FeatureStore(settings.feature_store_bytes, settings.block_tokens, fuser.hidden, fuser.dtype),
        verifier_id=engine_id,
        max_draft_tokens=speculation.max_draft_tokens,
        soft_deadline_s=speculation.soft_deadline_s,
        control=_control(settings, fuser.block_size) if speculation.adaptive else None,
    )


def _control(settings: VerifierSettings, block_size: int) -> SpeculationControl:
    speculation = settings.speculation
    layers = read_target_config(settings.target).layers
    return SpeculationControl(block_size - 1, read_prior(speculation.step_table, speculation.draft_table, layers))


def _serve(engine: Engine, host: str, access: Access, on_ready: Callable[[str], None]) -> None:
    port = EnginePort(engine, host, access=access)
    try:
        log.info("engine %s listens at %s", engine.info.engine_id, port.address)
        on_ready(port.address)
        engine.run()
    finally:
        port.stop()


def _limits(settings: VerifierSettings, blocks: int) -> SchedulerLimits:
    return SchedulerLimits(
        slots=settings.max_requests,
        blocks=blocks,
        block_tokens=settings.block_tokens,
        step_tokens=settings.max_step_tokens,
        max_waiting=settings.max_waiting,
        prefix_cache=settings.prefix_cache,
    )
