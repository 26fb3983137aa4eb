"""What does not fit is said before anything is served: which setting, which value, what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from drafter_service.loading import load_drafter
from tests.drafter_service.pairs import (
    FULL,
    HIDDEN,
    MAX_CONTEXT,
    SLIDING,
    TARGET_LAYERS,
    VOCABULARY,
    settings_for,
    write_drafter,
)


def test_a_pair_that_fits_is_loaded(target_dir: Path, drafter_dir: Path) -> None:
    loaded = load_drafter(settings_for(target_dir, drafter_dir))
    assert loaded.embedding.shape == (VOCABULARY, HIDDEN)
    assert loaded.head(torch.zeros(2, HIDDEN)).shape == (2, VOCABULARY)
    assert (loaded.vocabulary, loaded.window) == (VOCABULARY, MAX_CONTEXT)
    assert len({loaded.target_fingerprint, loaded.feature_version, loaded.drafter_version}) == 3


@pytest.mark.parametrize(
    ("changes", "field", "values"),
    [
        ({"hidden_size": 40}, "hidden_size", (40, HIDDEN)),
        ({"vocab_size": 50}, "vocab_size", (50, VOCABULARY)),
        ({"num_target_layers": 4}, "num_target_layers", (4, TARGET_LAYERS)),
        ({"dflash_config": {"target_layer_ids": [0, 9], "mask_token_id": 3}}, "target_layer_ids", (9, TARGET_LAYERS)),
        ({"dflash_config": {"target_layer_ids": [0], "mask_token_id": 99}}, "mask_token_id", (99, VOCABULARY)),
        ({"block_size": 1}, "block_size", (1,)),
    ],
)
def test_a_drafter_of_another_target_is_refused(
    target_dir: Path, drafter_dir: Path, tmp_path: Path, changes: dict[str, Any], field: str, values: tuple[int, ...]
) -> None:
    config = json.loads((drafter_dir / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as refusal:
        load_drafter(settings_for(target_dir, tmp_path))
    assert "drafter.checkpoint" in str(refusal.value)
    assert field in str(refusal.value)
    for value in values:
        assert str(value) in str(refusal.value)


@pytest.mark.parametrize("missing", ["checkpoint", "target"])
def test_a_missing_checkpoint_is_named(target_dir: Path, drafter_dir: Path, missing: str) -> None:
    settings = settings_for(target_dir, drafter_dir).model_copy(update={missing: "/does/not/exist"})
    with pytest.raises(ConfigError, match=rf"drafter\.{missing}.*/does/not/exist"):
        load_drafter(settings)


def test_a_drafter_without_weights_is_refused(target_dir: Path, drafter_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((drafter_dir / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors"):
        load_drafter(settings_for(target_dir, tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_device_is_refused(target_dir: Path, drafter_dir: Path) -> None:
    with pytest.raises(ConfigError, match="set device to 'cpu'"):
        load_drafter(settings_for(target_dir, drafter_dir, device="cuda"))


@pytest.mark.parametrize(
    ("layer_types", "set_window", "window"),
    [
        ([SLIDING, SLIDING], 100, 24),
        ([SLIDING, FULL], 100, 100),
        ([FULL, FULL], 100, 100),
        ([FULL, FULL], 4096, MAX_CONTEXT),
    ],
)
def test_the_window_is_the_checkpoints_if_no_layer_looks_further(
    target_dir: Path, tmp_path: Path, layer_types: list[str], set_window: int, window: int
) -> None:
    drafter = write_drafter(tmp_path, layer_types=layer_types, sliding_window=24)
    assert load_drafter(settings_for(target_dir, drafter, window=set_window)).window == window


def test_scales_of_the_checkpoint_are_read(target_dir: Path, tmp_path: Path) -> None:
    extra = {"target_layer_ids": [0, 2], "mask_token_id": 3, "output_multiplier": 0.5, "final_logit_softcapping": 2.0}
    drafter = write_drafter(tmp_path, dflash_config=extra, input_embedding_scale=3.0)
    loaded = load_drafter(settings_for(target_dir, drafter))
    assert loaded.embedding_scale == 3.0
    torch.testing.assert_close(loaded.shaped(torch.tensor([4.0, -8.0])), 2 * torch.tanh(torch.tensor([1.0, -2.0])))
