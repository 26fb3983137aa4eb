"""Collects what a plan is worked out from: the deploy file, the configurations of its two models, its GPUs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError
from deploy.architecture import check_architecture, shipped, shipped_names
from deploy.checks import CHECKOUT, find_directory, fitting
from deploy.config import Application
from deploy.file import parse_deploy_file
from drafter_service.config import DrafterSettings
from drafter_service.sizing import MOST, ON_CPU
from modeling.dflash_config import DFlashConfig
from modeling.errors import CheckpointError
from modeling.footprint import storage_of
from modeling.kv_dtype import DTYPE_BYTES, KvDtype
from modeling.quantized.scheme import scheme_of
from modeling.target_config import configuration_file, read_target_config
from paceline.plan.gpus import Gpu, gpu_named, gpu_of_bundle
from paceline.plan.memory import DrafterModel, TargetModel, drafter_memory, drafter_model
from verifier_service.step_tables.tables import DraftTable, VerifyTable, read_draft_table, read_verify_table


@dataclass(frozen=True)
class Options:
    """What the command line says beside the file; None = what the file says."""

    gpu: str | None = None
    drafter_gpu: str | None = None
    architecture: str | None = None
    drafter_architecture: str | None = None
    steps: Path | None = None
    drafts: Path | None = None


@dataclass(frozen=True)
class Source:
    """Where a model's configuration was read, and what of it is assumed rather than published."""

    path: str
    assumed: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """A drafter and how it is run. settings: in mode colocated those that follow from the verifier's. contexts: that it
    holds at once; with `auto` what its GPU has room for, as estimated. table: measured seconds of its drafts, if there
    are any.
    """

    config: DFlashConfig
    model: DrafterModel
    settings: DrafterSettings
    window: int
    contexts: int
    source: Source
    gpu: Gpu | None
    table: DraftTable | None


@dataclass(frozen=True)
class Inputs:
    """gpu: of the ranks; None = unknown, or device cpu. draft: None for plain decoding. table: measured seconds of the
    target's steps, if there are any.
    """

    application: Application
    target: TargetModel
    source: Source
    gpu: Gpu | None
    draft: Draft | None
    table: VerifyTable | None


def read_inputs(path: Path, options: Options) -> Inputs:
    """Raises ConfigError: the file, its checkpoints' configurations or the options cannot work."""
    application = parse_deploy_file(path).application
    verifier, drafter = application.verifier, application.drafter
    drafts = verifier.speculation.mode != "none"
    target = _configuration(
        "verifier.target", verifier.target, "verifier.architecture", options.architecture or verifier.architecture
    )
    checkpoint = None
    if drafts and verifier.drafter is not None:
        named = options.drafter_architecture or (drafter.architecture if drafter is not None else None)
        key = "drafter.checkpoint" if drafter is not None else "verifier.drafter"
        checkpoint = _configuration(key, verifier.drafter, "drafter.architecture", named)
    try:
        application = fitting(application, target, checkpoint)
    except ConfigError as error:
        raise ConfigError(f"{path}: args: {error}") from error
    gpu = _gpu("--gpu", options.gpu, verifier.device, verifier.bundles[1])
    steps = options.steps or application.verifier.speculation.step_table
    return Inputs(
        application=application,
        target=_target(target, verifier.dtype, verifier.kv_dtype),
        source=_source(target),
        gpu=gpu,
        draft=None if checkpoint is None else _draft(application, target, checkpoint, options, gpu),
        table=None if steps is None else read_verify_table(Path(steps)),
    )


def _configuration(key: str, given: str, architecture_key: str, architecture: str | None) -> Path:
    """The checkpoint's directory if it is here, else the shipped configuration that is named."""
    directory = find_directory(given)
    if directory is not None:
        if architecture is not None:
            check_architecture(architecture_key, architecture, key, directory)
        return directory
    if architecture is None:
        option = "--architecture" if architecture_key.startswith("verifier") else "--drafter-architecture"
        raise ConfigError(
            f"{key} is {given!r}, which is not on this machine: set {architecture_key} (or {option}) to what it is, "
            f"one of {', '.join(name for name in shipped_names() if name.endswith('-dflash') == ('drafter' in option))}"
        )
    return shipped(architecture_key, architecture)


def _target(path: Path, dtype: str, kv_dtype: KvDtype) -> TargetModel:
    from verifier_service.model.touchpoints import text_shapes  # brings transformers

    try:
        config = read_target_config(path)
        scheme, itemsize = scheme_of(config), DTYPE_BYTES[dtype]
        storage = storage_of(scheme, itemsize)
        return TargetModel(config, text_shapes(config), scheme, storage, itemsize, kv_dtype)
    except CheckpointError as error:
        raise ConfigError(f"verifier.target: {error}") from error


def _draft(application: Application, target: Path, checkpoint: Path, options: Options, gpu: Gpu | None) -> Draft:
    from drafter_service.loading import context_window  # brings torch

    verifier, drafter = application.verifier, application.drafter
    remote = application.drafts_remotely and drafter is not None
    settings = (
        drafter.settings
        if remote and drafter is not None
        else DrafterSettings(
            checkpoint=str(checkpoint), target=str(target), dtype=verifier.dtype, max_contexts=verifier.max_requests
        )
    )
    config, target_config = DFlashConfig.load(checkpoint), read_target_config(target)
    if remote and drafter is not None:
        gpu = _gpu("--drafter-gpu", options.drafter_gpu, drafter.device, drafter.bundles[1]) or gpu
    model = drafter_model(config, target_config.tied, DTYPE_BYTES[settings.dtype])
    window = context_window(config, settings, target_config)
    return Draft(
        config=config,
        model=model,
        settings=settings,
        window=window,
        contexts=_contexts(settings, model, window, gpu),
        source=_source(checkpoint),
        gpu=gpu,
        table=_draft_table(options.drafts or verifier.speculation.draft_table, config),
    )


def _draft_table(path: Path | str | None, config: DFlashConfig) -> DraftTable | None:
    if path is None:
        return None
    table = read_draft_table(Path(path))
    table.check_block(config.block_size, str(path))
    return table


def _contexts(settings: DrafterSettings, model: DrafterModel, window: int, gpu: Gpu | None) -> int:
    if settings.max_contexts != "auto":
        return settings.max_contexts
    if gpu is None:
        return ON_CPU
    room = drafter_memory(model, window, 0, int(settings.memory_share * gpu.memory_bytes)).context_capacity
    return max(1, min(room or 0, MOST))


def _gpu(option: str, named: str | None, device: str, bundle: dict[str, float]) -> Gpu | None:
    if named is not None:
        return gpu_named(option, named)
    kind = gpu_of_bundle(bundle)
    return gpu_named("accelerator_type", kind) if kind is not None and device == "cuda" else None


def _source(path: Path) -> Source:
    shown = path.relative_to(CHECKOUT) if path.is_relative_to(CHECKOUT) else path
    return Source(str(shown), tuple(_raw(path).get("_assumed", ())))


def _raw(path: Path) -> dict:
    return json.loads(configuration_file(path).read_text())
