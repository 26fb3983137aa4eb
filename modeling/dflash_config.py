"""The configuration of a DFlash checkpoint, readable without torch: deploy files are checked before anything starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.target_config import configuration_file

FULL, SLIDING = "full_attention", "sliding_attention"


class DraftCheckpointError(ValueError):
    """A directory that is no usable DFlash checkpoint: names the file or key, the value and the cure."""


@dataclass(frozen=True)
class DFlashConfig:
    """One checkpoint's config.json. `causal[i]`: rows of a block see only earlier rows in layer i."""

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
        return cls(
            directory=directory,
            raw=raw,
            hidden=int(need("hidden_size")),
            layers=layers,
            block_size=int(need("block_size", raw, extra)),
            vocabulary=int(need("vocab_size")),
            num_target_layers=target_layers,
            target_layer_ids=taps,
            mask_token_id=int(need("mask_token_id", extra, raw)),
            layer_types=types,
            sliding_window=int(window) if window and SLIDING in types else None,
            causal=tuple(bool(override) if override is not None else kind == SLIDING for kind in types),
        )
