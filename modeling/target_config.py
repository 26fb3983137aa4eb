"""What a target's config.json says, read without building the model and without torch: deploy files are checked so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.errors import CheckpointError


@dataclass(frozen=True)
class TargetConfig:
    """The text model of a checkpoint. `text` is its configuration as on disk (the text tower's, if multimodal).

    directory: the checkpoint's, or a configuration file that stands alone.
    quantization: the checkpoint's quantization_config as on disk, None if its weights are not packed.
    """

    directory: Path
    model_type: str
    vocabulary: int
    hidden: int
    layers: int
    max_context: int
    tied: bool
    text: Mapping[str, Any]
    quantization: Mapping[str, Any] | None = None

    @property
    def file(self) -> Path:
        """Where it was read."""
        return configuration_file(self.directory)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of the text configuration; CheckpointError if it is absent and has no default."""
        value = self.text.get(key)
        if value is None:
            value = default
        if not isinstance(value, int):
            raise CheckpointError(
                f"{self.file} must give {key} as a whole number, not {value!r}: take the checkpoint's own config.json"
            )
        return value


def configuration_file(checkpoint: str | Path) -> Path:
    """config.json of a checkpoint directory; a path that ends in .json stands for itself."""
    path = Path(checkpoint)
    return path if path.suffix == ".json" else path / "config.json"


def read_target_config(checkpoint: str | Path) -> TargetConfig:
    """Read and check config.json, of a directory or alone (no weights are needed).

    Raises CheckpointError naming the file and key if it cannot be used.
    """
    path = configuration_file(checkpoint)
    raw = _read_json(path)
    text = raw.get("text_config") or raw
    model_type = text.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path} has no model_type: take the checkpoint's own config.json")
    directory = Path(checkpoint)
    bare = TargetConfig(directory, model_type, 0, 0, 0, 0, False, text)
    return TargetConfig(
        directory=directory,
        model_type=model_type,
        vocabulary=bare.integer("vocab_size"),
        hidden=bare.integer("hidden_size"),
        layers=bare.integer("num_hidden_layers"),
        max_context=bare.integer("max_position_embeddings"),
        tied=bool(text.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
        text=text,
        quantization=_quantization(path.parent, raw, text),
    )


def _quantization(directory: Path, raw: Mapping[str, Any], text: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = raw.get("quantization_config") or text.get("quantization_config")
    aside = directory / "hf_quant_config.json"  # where ModelOpt kept it at first
    if not found and aside.exists():
        return {"quant_method": "modelopt", **_read_json(aside)}
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config must be an object, not {found!r}: "
            "take the checkpoint's own config.json"
        )
    return found or None


def target_fingerprint(directory: str | Path) -> str:
    """Hash of configuration, tokenizer and the names and shapes of all weights: a drafter serves exactly one.

    Weights' values are not read. Raises CheckpointError for a directory that is no checkpoint.
    """
    from modeling.reader import CheckpointReader  # brings torch

    directory = Path(directory)
    digest = hashlib.sha256()
    digest.update(json.dumps(_read_json(directory / "config.json"), sort_keys=True).encode())
    for name in ("tokenizer.json", "tiktoken.model"):
        if (directory / name).exists():
            digest.update((directory / name).read_bytes())
    with CheckpointReader(directory) as reader:
        for name in reader.names():
            digest.update(f"{name}{reader.shape(name)}".encode())
    return digest.hexdigest()[:32]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise CheckpointError(f"checkpoint directory {path.parent} does not exist: give the path of a local checkpoint")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: {path.parent} is no model checkpoint")
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object: download it again")
    return value
