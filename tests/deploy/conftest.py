"""A pair of checkpoints as far as a deploy file's checks look at them: config.json and the weights' names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

TARGET = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
DRAFTER = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_target_layers": 4,
    "vocab_size": 100,
    "block_size": 8,
    "dflash_config": {"target_layer_ids": [1, 2], "mask_token_id": 99},
}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Directory with target/ and drafter/ that fit each other."""
    for name, config in (("target", TARGET), ("drafter", DRAFTER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").touch()
    return tmp_path


@pytest.fixture
def change(pair: Path) -> Callable[..., None]:
    """change("drafter", hidden_size=64) edits that checkpoint's config.json."""

    def edit(name: str, **changes: Any) -> None:
        path = pair / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.fixture
def arguments(pair: Path) -> dict[str, Any]:
    """Arguments of the application, ready to be spoilt."""
    return {
        "model_name": "tiny",
        "verifier": {"target": str(pair / "target"), "tensor_parallel_size": 2, "device": "cpu"},
        "drafter": {"checkpoint": str(pair / "drafter"), "device": "cpu"},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a deploy file around the given arguments; `top` are further keys of the file."""

    def write_file(arguments: Any, **top: Any) -> Path:
        application = {"name": "app", "route_prefix": "/", "import_path": "deploy.app:build", "args": arguments}
        path = tmp_path / "app.yaml"
        path.write_text(yaml.safe_dump({"applications": [application], **top}))
        return path

    return write_file
