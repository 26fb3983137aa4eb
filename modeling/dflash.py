"""DFlash checkpoints as both services read them: configuration, feature fuser, versions.

Format (z-lab/dflash, arXiv 2602.06036): Qwen3 dimensions plus `dflash_config: {target_layer_ids, mask_token_id}`;
weights without embedding and head. `target_layer_ids` are 0-based layer *outputs*.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

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
        """Read and check `config.json`. Raises DraftCheckpointError."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise DraftCheckpointError(f"drafter checkpoint {str(directory)!r}: {path} does not exist")
        try:
            raw = json.loads(path.read_text())
        except ValueError as error:
            raise DraftCheckpointError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(raw, Path(directory))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], directory: Path) -> DFlashConfig:
        where = directory / "config.json"
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
            sliding_window=int(window) if SLIDING in types else None,
            causal=tuple(bool(override) if override is not None else kind == SLIDING for kind in types),
        )


class FeatureFuser:
    """Context features: hidden_norm(fc(concatenated tap-layer outputs)). Runs where the target runs.

    Callable: taps [n, taps x hidden] -> features [n, hidden], in the dtype it was loaded in.
    """

    def __init__(self, config: DFlashConfig, fc: torch.Tensor, hidden_norm: torch.Tensor, eps: float = 1e-6):
        if fc.shape != (config.hidden, len(config.target_layer_ids) * config.hidden):
            raise DraftCheckpointError(
                f"{config.directory}: fc.weight is {tuple(fc.shape)}, but hidden_size {config.hidden} and "
                f"{len(config.target_layer_ids)} taps need "
                f"({config.hidden}, {len(config.target_layer_ids) * config.hidden})"
            )
        self.config, self.fc, self.hidden_norm, self.eps = config, fc, hidden_norm, eps
        self.feature_version = feature_version(fc, hidden_norm, config.target_layer_ids)

    @classmethod
    def load(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> FeatureFuser:
        """Read only fc and hidden_norm of a checkpoint. Raises DraftCheckpointError."""
        config = DFlashConfig.load(directory)
        weights = read_weights(config.directory, ("fc.weight", "hidden_norm.weight"))
        fuser = cls(config, weights["fc.weight"], weights["hidden_norm.weight"], config.raw.get("rms_norm_eps", 1e-6))
        fuser.fc, fuser.hidden_norm = (w.to(device=device, dtype=dtype) for w in (fuser.fc, fuser.hidden_norm))
        return fuser

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return self.config.target_layer_ids

    @property
    def hidden(self) -> int:
        return self.config.hidden

    @property
    def block_size(self) -> int:
        return self.config.block_size

    def __call__(self, taps: torch.Tensor) -> torch.Tensor:
        fused = torch.nn.functional.linear(taps.to(self.fc.dtype), self.fc)
        return torch.nn.functional.rms_norm(fused, (self.hidden,), self.hidden_norm, self.eps)


def feature_version(fc: torch.Tensor, hidden_norm: torch.Tensor, taps: Iterable[int]) -> str:
    """Decides whether stored context features are usable: hash of fc, hidden_norm (as stored) and the tap ids."""
    return _digest([fc, hidden_norm], repr(tuple(taps)))


def drafter_version(directory: str | Path) -> str:
    """Hash of all weights of a checkpoint, in name order."""
    weights = read_weights(Path(directory))
    return _digest([weights[name] for name in sorted(weights)], repr(sorted(weights)))


def read_weights(directory: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Named weights (all by default) of a checkpoint of one or more safetensors files, in their stored dtype."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise DraftCheckpointError(f"drafter checkpoint {str(directory)!r} holds no *.safetensors file")
    wanted = None if names is None else set(names)
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (a safetensors reader is no dict)
                if wanted is None or name in wanted:
                    found[name] = reader.get_tensor(name)
    missing = sorted((wanted or set()) - set(found))
    if missing:
        raise DraftCheckpointError(f"drafter checkpoint {str(directory)!r} lacks the tensors {missing}")
    return found


def _digest(tensors: Iterable[torch.Tensor], salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for tensor in tensors:
        digest.update(str(tensor.dtype).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
