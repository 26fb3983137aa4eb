"""config.json as Paceline reads it, and the fingerprint that ties a drafter to its target."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from modeling.errors import CheckpointError
from modeling.families import family_of
from modeling.target_config import read_target_config, target_fingerprint

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}


def write(directory, config, tokenizer="{}", **tensors):
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(tokenizer)
    save_file({"w": torch.zeros(2, 3), **tensors}, directory / "model.safetensors")
    return directory


def test_dimensions_are_read(tmp_path):
    config = read_target_config(write(tmp_path, LLAMA))
    assert (config.vocabulary, config.hidden, config.layers, config.max_context) == (100, 64, 3, 512)
    assert not config.tied


def test_a_multimodal_checkpoint_yields_its_text_tower(tmp_path):
    config = read_target_config(write(tmp_path, {"model_type": "qwen3_5_moe", "text_config": LLAMA, "hidden_size": 1}))
    assert (config.model_type, config.hidden) == ("llama", 64)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        read_target_config(tmp_path / "nowhere")


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json does not exist: .* is no model checkpoint"):
        read_target_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        read_target_config(tmp_path)


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="must give hidden_size as a whole number, not None"):
        read_target_config(write(tmp_path, {key: value for key, value in LLAMA.items() if key != "hidden_size"}))


def test_an_unsupported_family_is_refused_with_the_supported_ones(tmp_path):
    config = read_target_config(write(tmp_path, {**LLAMA, "model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"model_type 'mamba' is not supported; supported are .*llama, qwen3"):
        family_of(config)


def test_the_fingerprint_is_stable_across_copies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, LLAMA)
    assert target_fingerprint(tmp_path / "a") == target_fingerprint(tmp_path / "b")


def test_config_tokenizer_and_weight_shapes_change_the_fingerprint(tmp_path):
    prints = {
        target_fingerprint(write(tmp_path, LLAMA)),
        target_fingerprint(write(tmp_path, {**LLAMA, "num_hidden_layers": 4})),
        target_fingerprint(write(tmp_path, LLAMA, tokenizer='{"a": 1}')),
        target_fingerprint(write(tmp_path, LLAMA, w=torch.zeros(3, 2))),
        target_fingerprint(write(tmp_path, LLAMA, other=torch.zeros(1))),
    }
    assert len(prints) == 5
