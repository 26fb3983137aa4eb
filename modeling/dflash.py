"""DFlash checkpoints as both services read them: configuration, feature fuser, versions.

Format (z-lab/dflash, arXiv 2602.06036): Qwen3 dimensions plus `dflash_config: {target_layer_ids, mask_token_id}`, for
DFlash 2 with the sizes of `DFlash2`; weights without embedding and head. `target_layer_ids`: 0-based layer *outputs*.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from modeling.dflash_config import FULL, SLIDING, DFlash2, DFlashConfig, DraftCheckpointError
from modeling.fixed_linear import fixed_linear

__all__ = [
    "FULL",
    "SLIDING",
    "DFlash2",
    "DFlashConfig",
    "DraftCheckpointError",
    "FeatureFuser",
    "drafter_version",
    "feature_version",
    "read_weights",
]


class FeatureFuser:
    """Context features: hidden_norm(fc(concatenated tap-layer outputs)). Runs where the target runs.

    Callable: taps [n, taps x hidden] -> features [n, hidden], in the dtype it was loaded in.
    """

    def __init__(
        self,
        config: DFlashConfig,
        fc: torch.Tensor,
        hidden_norm: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        if fc.shape != (config.hidden, len(config.target_layer_ids) * config.hidden):
            raise DraftCheckpointError(
                f"{config.directory}: fc.weight is {tuple(fc.shape)}, but hidden_size {config.hidden} and "
                f"{len(config.target_layer_ids)} taps need "
                f"({config.hidden}, {len(config.target_layer_ids) * config.hidden})"
            )
        self.config, self.dtype = config, dtype
        self.feature_version = feature_version(fc, hidden_norm, config.target_layer_ids)
        self._multiply = fixed_linear(fc.to(device=device, dtype=dtype))
        self._norm = hidden_norm.to(device=device, dtype=dtype)
        self._eps = config.raw.get("rms_norm_eps", 1e-6)

    @classmethod
    def load(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> FeatureFuser:
        """Read only fc and hidden_norm of a checkpoint. Raises DraftCheckpointError."""
        config = DFlashConfig.load(directory)
        weights = read_weights(config.directory, ("fc.weight", "hidden_norm.weight"))
        return cls(config, weights["fc.weight"], weights["hidden_norm.weight"], dtype, device)

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
        fused = self._multiply(taps.to(self.dtype))
        return torch.nn.functional.rms_norm(fused, (self.hidden,), self._norm, self._eps)


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
