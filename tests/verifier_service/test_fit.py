"""Checkpoints that are missing or do not fit each other are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from verifier_service.config import VerifierSettings
from verifier_service.fit import check_fit

TARGET = {
    "model_type": "qwen3",
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}
DRAFTER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "block_size": 8,
    "vocab_size": 256,
    "num_target_layers": 4,
    "dflash_config": {"target_layer_ids": [0, 3], "mask_token_id": 3},
}


def settings(tmp_path: Path, target: dict[str, Any], drafter: dict[str, Any], **changes: Any) -> VerifierSettings:
    for name, config in (("target", target), ("drafter", drafter)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    paths = {"target": str(tmp_path / "target"), "drafter": str(tmp_path / "drafter")}
    return VerifierSettings(**{**paths, **changes})


def test_a_fitting_pair_is_read(tmp_path: Path):
    fit = check_fit(settings(tmp_path, TARGET, DRAFTER))
    assert fit.drafter is not None
    assert (fit.target.vocabulary, fit.drafter.block_size) == (256, 8)


def test_plain_decoding_does_not_look_at_the_drafter(tmp_path: Path):
    assert check_fit(settings(tmp_path, TARGET, {}, speculation={"mode": "none"})).drafter is None


@pytest.mark.parametrize(
    ("target", "drafter", "changes", "words"),
    [
        ({}, {"hidden_size": 32}, {}, ["hidden_size", "32", "64"]),
        ({}, {"vocab_size": 300}, {}, ["vocab_size", "300", "256"]),
        ({"num_hidden_layers": 3}, {}, {}, ["[3]", "0..2"]),
        ({}, {}, {"max_context": 1000}, ["max_context", "1000", "512"]),
        ({}, {}, {"tensor_parallel_size": 3}, ["tensor_parallel_size 3", "8"]),
        ({}, {"block_size": None}, {}, ["verifier.drafter", "block_size"]),
        ({"model_type": "other"}, {}, {}, ["verifier.target", "other"]),
    ],
)
def test_what_does_not_fit_is_named_with_both_values(tmp_path: Path, target, drafter, changes, words):
    with pytest.raises(ConfigError) as caught:
        check_fit(settings(tmp_path, {**TARGET, **target}, {**DRAFTER, **drafter}, **changes))
    for word in words:
        assert word in str(caught.value)


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"verifier\.target.*nowhere does not exist"):
        check_fit(VerifierSettings(target=str(tmp_path / "nowhere"), speculation={"mode": "none"}))
