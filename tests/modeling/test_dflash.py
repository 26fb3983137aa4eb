"""DFlash checkpoints: what is read, what is refused, what the versions depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modeling.dflash import (
    FULL,
    SLIDING,
    DFlash2,
    DFlashConfig,
    DraftCheckpointError,
    FeatureFuser,
    drafter_version,
    feature_version,
    read_weights,
)

HIDDEN = 8
RAW: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "vocab_size": 20,
    "num_target_layers": 6,
    "block_size": 4,
    "layer_types": [SLIDING, FULL],
    "sliding_window": 16,
    "dflash_config": {"target_layer_ids": [1, 4], "mask_token_id": 3},
}
SECOND: dict[str, Any] = RAW["dflash_config"] | {
    "conv_kernel_size": 2,
    "conv_group_size": 4,
    "selector_rank": 8,
    "selector_top_k": 5,
}


def config(**changes: Any) -> DFlashConfig:
    raw = {key: value for key, value in (RAW | changes).items() if value is not None}
    return DFlashConfig.from_dict(raw, Path("drafter"))


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "fc.weight": torch.randn(HIDDEN, 2 * HIDDEN),
        "hidden_norm.weight": torch.rand(HIDDEN) + 0.5,
        "norm.weight": torch.ones(HIDDEN),
    }


def checkpoint(directory: Path, *shards: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(RAW))
    for i, shard in enumerate(shards):
        save_file(shard, directory / f"model-{i}.safetensors")
    return directory


def test_a_published_configuration_is_read():
    read = config()
    assert (read.hidden, read.layers, read.block_size, read.vocabulary) == (HIDDEN, 2, 4, 20)
    assert (read.target_layer_ids, read.mask_token_id, read.num_target_layers) == ((1, 4), 3, 6)
    assert (read.layer_types, read.sliding_window) == ((SLIDING, FULL), 16)


def test_sliding_layers_are_causal_unless_the_checkpoint_says_otherwise():
    assert config().causal == (True, False)
    assert config(is_causal=False).causal == (False, False)
    assert config(is_causal=True).causal == (True, True)


def test_without_layer_types_every_layer_is_full_and_the_window_means_nothing():
    read = config(layer_types=None)
    assert (read.layer_types, read.sliding_window) == ((FULL, FULL), None)


def test_the_block_size_may_stand_in_either_place():
    extra = RAW["dflash_config"] | {"block_size": 16}
    assert config(block_size=None, dflash_config=extra).block_size == 16


def test_a_second_version_is_known_by_its_sizes_in_either_place():
    sizes = {key: SECOND[key] for key in SECOND.keys() - RAW["dflash_config"].keys()}
    assert config().v2 is None
    assert config(dflash_config=SECOND).v2 == config(**sizes).v2 == DFlash2(2, 4, 8, 5)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": None}, ["hidden_size"]),
        ({"dflash_config": {"mask_token_id": 3}}, ["target_layer_ids"]),
        ({"dflash_config": {"target_layer_ids": [1]}}, ["mask_token_id"]),
        ({"dflash_config": {"target_layer_ids": [1, 6], "mask_token_id": 3}}, ["[1, 6]", "6"]),
        ({"dflash_config": {"target_layer_ids": [-1], "mask_token_id": 3}}, ["[-1]"]),
        ({"layer_types": [FULL]}, ["layer_types", "2 entries"]),
        ({"layer_types": [FULL, "linear_attention"]}, ["layer_types", "linear_attention"]),
        ({"sliding_window": None}, ["sliding_window", "None"]),
        ({"architectures": ["DFlash2DraftModel"]}, ["conv_kernel_size is None", "selector_top_k"]),
        ({"dflash_config": SECOND | {"selector_rank": None}}, ["selector_rank is None", "DFlash 2"]),
        ({"dflash_config": SECOND | {"selector_rank": "256"}}, ["selector_rank is '256'"]),
        ({"dflash_config": SECOND | {"conv_group_size": 3}}, ["conv_group_size 3", f"hidden_size {HIDDEN}"]),
        ({"dflash_config": SECOND | {"selector_top_k": 21}}, ["selector_top_k is 21", "vocab_size only 20"]),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_with_key_and_value(changes, parts):
    with pytest.raises(DraftCheckpointError) as refusal:
        config(**changes)
    for part in ["config.json", *parts]:
        assert part in str(refusal.value)


def test_a_directory_without_a_readable_configuration_is_refused(tmp_path):
    with pytest.raises(DraftCheckpointError, match=r"config\.json does not exist"):
        DFlashConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DraftCheckpointError, match="is not JSON"):
        DFlashConfig.load(tmp_path)


def test_the_fuser_is_the_norm_of_the_projection(tmp_path):
    stored = weights()
    fuser = FeatureFuser.load(checkpoint(tmp_path, stored))
    taps = torch.randn(5, 2 * HIDDEN)
    fused = taps @ stored["fc.weight"].T
    right = fused / (fused.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * stored["hidden_norm.weight"]
    torch.testing.assert_close(fuser(taps), right)
    assert (fuser.hidden, fuser.block_size, fuser.target_layer_ids) == (HIDDEN, 4, (1, 4))


def test_the_fuser_takes_taps_of_any_dtype_and_answers_in_its_own(tmp_path):
    fuser = FeatureFuser.load(checkpoint(tmp_path, weights()), torch.bfloat16)
    assert fuser(torch.randn(3, 2 * HIDDEN)).dtype == torch.bfloat16


def test_the_feature_version_is_of_the_stored_weights_whatever_dtype_they_are_used_in(tmp_path):
    directory = checkpoint(tmp_path, weights())
    one, other = FeatureFuser.load(directory), FeatureFuser.load(directory, torch.bfloat16)
    assert one.feature_version == other.feature_version


def test_the_feature_version_depends_on_projection_norm_and_taps():
    fc, norm = weights()["fc.weight"], weights()["hidden_norm.weight"]
    versions = {
        feature_version(fc, norm, (1, 4)),
        feature_version(fc + 1, norm, (1, 4)),
        feature_version(fc, norm + 1, (1, 4)),
        feature_version(fc, norm, (1, 3)),
        feature_version(fc, norm, (4, 1)),
    }
    assert len(versions) == 5


def test_the_drafter_version_depends_on_every_weight_and_not_on_the_files(tmp_path):
    stored = weights()
    whole = drafter_version(checkpoint(tmp_path / "whole", stored))
    first, *rest = stored
    sharded = checkpoint(tmp_path / "sharded", {first: stored[first]}, {name: stored[name] for name in rest})
    assert drafter_version(sharded) == whole
    for name in stored:
        changed = checkpoint(tmp_path / name, stored | {name: stored[name] * 2})
        assert drafter_version(changed) != whole


def test_a_fuser_of_another_width_is_refused(tmp_path):
    wrong = weights() | {"fc.weight": torch.randn(HIDDEN, 3 * HIDDEN)}
    with pytest.raises(DraftCheckpointError, match=r"fc.weight is \(8, 24\).*2 taps need \(8, 16\)"):
        FeatureFuser.load(checkpoint(tmp_path, wrong))


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(DraftCheckpointError, match=r"no \*\.safetensors"):
        read_weights(checkpoint(tmp_path))
    checkpoint(tmp_path, {"norm.weight": torch.ones(HIDDEN)})
    with pytest.raises(DraftCheckpointError, match=r"fc\.weight"):
        read_weights(tmp_path, ("fc.weight",))
