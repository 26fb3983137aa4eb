"""The configuration of a DFlash checkpoint, readable without torch: deploy files are checked before anything starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from modeling.target_config import configuration_file

FULL, SLIDING = "full_attention", "sliding_attention"
SECOND = "DFlash2DraftModel"  # the published architecture's name


class DraftCheckpointError(ValueError):
    """A directory that is no usable DFlash checkpoint: names the file or key, the value and the cure."""


@dataclass(frozen=True)
class DFlash2:
    """What DFlash 2 adds. Convolutions over conv_kernel_size rows of a block, whose dynamic weights are shared by
    conv_group_size channels; a selector with codebooks of selector_rank that chooses among selector_top_k tokens a row.
    """

    conv_kernel_size: int
    conv_group_size: int
    selector_rank: int
    selector_top_k: int


@dataclass(frozen=True)
class DFlashConfig:
    """One checkpoint's config.json. `causal[i]`: rows of a block see only earlier rows in layer i. v2: None for v1."""

    directory: Path
    raw: dict[str, Any]
    hidden: int
    layers: int
    block_size: int
    vocabulary: int
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int
    layer_types: tuple[str, ...]
    sliding_window: int | None
    causal: tuple[bool, ...]
    v2: DFlash2 | None = None

    @classmethod
    def load(cls, directory: str | Path) -> DFlashConfig:
        """Read and check `config.json`, of a directory or alone. Raises DraftCheckpointError."""
        path = configuration_file(directory)
        if not path.is_file():
            raise DraftCheckpointError(f"drafter checkpoint {str(directory)!r}: {path} does not exist")
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise DraftCheckpointError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(raw, Path(directory))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], directory: Path) -> DFlashConfig:
        where = configuration_file(directory)
        extra = raw.get("dflash_config") or {}

        def need(key: str, *sources: dict[str, Any]) -> Any:
            for source in sources or (raw,):
                if source.get(key) is not None:
                    return source[key]
            raise DraftCheckpointError(f"{where}: {key!r} is missing; a DFlash checkpoint has to state it")

        layers = int(need("num_hidden_layers"))
        types = tuple(raw.get("layer_types") or [FULL] * layers)
        if len(types) != layers or set(types) - {FULL, SLIDING}:
            raise DraftCheckpointError(
                f"{where}: layer_types must hold {layers} entries of {FULL!r} or {SLIDING!r}, not {types}"
            )
        window = raw.get("sliding_window")
        if SLIDING in types and not window:
            raise DraftCheckpointError(f"{where}: layer_types has {SLIDING!r} but sliding_window is {window!r}")
        override = raw.get("is_causal")
        taps = tuple(int(i) for i in need("target_layer_ids", extra, raw))
        target_layers = int(need("num_target_layers"))
        if not taps or min(taps) < 0 or max(taps) >= target_layers:
            raise DraftCheckpointError(
                f"{where}: target_layer_ids {list(taps)} must be 0-based layer outputs below "
                f"num_target_layers {target_layers}"
            )
        hidden, vocabulary = int(need("hidden_size")), int(need("vocab_size"))
        return cls(
            directory=directory,
            raw=raw,
            hidden=hidden,
            layers=layers,
            block_size=int(need("block_size", raw, extra)),
            vocabulary=vocabulary,
            num_target_layers=target_layers,
            target_layer_ids=taps,
            mask_token_id=int(need("mask_token_id", extra, raw)),
            layer_types=types,
            sliding_window=int(window) if window and SLIDING in types else None,
            causal=tuple(bool(override) if override is not None else kind == SLIDING for kind in types),
            v2=_second_version(raw, where, hidden, vocabulary),
        )


def _second_version(raw: dict[str, Any], where: Path, hidden: int, vocabulary: int) -> DFlash2 | None:
    """None for DFlash 1. The keys are looked up in dflash_config, then beside it, as the published loader does."""
    extra = raw.get("dflash_config") or {}
    given = {field.name: extra.get(field.name, raw.get(field.name)) for field in fields(DFlash2)}
    if not any(given.values()) and SECOND not in (raw.get("architectures") or ()):
        return None
    sizes: dict[str, int] = {}
    for key, value in given.items():
        if not isinstance(value, int) or value < 1:
            raise DraftCheckpointError(
                f"{where}: {key} is {value!r}; a DFlash 2 checkpoint has to state it, in dflash_config, as a positive "
                f"whole number (beside {', '.join(other for other in given if other != key)})"
            )
        sizes[key] = value
    second = DFlash2(**sizes)
    if hidden % second.conv_group_size:
        raise DraftCheckpointError(
            f"{where}: hidden_size {hidden} is no multiple of conv_group_size {second.conv_group_size}"
        )
    if second.selector_top_k > vocabulary:
        raise DraftCheckpointError(f"{where}: selector_top_k is {second.selector_top_k}, vocab_size only {vocabulary}")
    return second
