"""What published quantization_configs say about which tensors are packed, and how many bytes they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modeling.errors import CheckpointError
from modeling.quantized.scheme import QuantScheme, scheme_of
from modeling.target_config import TargetConfig, read_target_config

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["model.language_model.layers.0.linear_attn.in_proj_a", "mlp.gate", "mtp.fc"],
}
GPT_OSS = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
KIMI: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4_WEIGHTS}},
}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "ignore": ["lm_head", "*.mlp.shared_expert.*", "model.language_model.layers.0.linear_attn*"],
}


def scheme(quantization: dict[str, Any]) -> QuantScheme:
    found = scheme_of(TargetConfig(Path("target"), "qwen3", 1, 1, 1, 1, False, {}, quantization))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("quantization", "name", "label"),
    [
        (FP8, "layers.0.self_attn.q_proj.weight", "FP8"),
        (FP8, "layers.0.linear_attn.in_proj_qkv.weight", "FP8"),
        (FP8, "layers.0.linear_attn.in_proj_a.weight", None),
        (FP8, "layers.0.self_attn.kv_a_proj_with_mqa.weight", "FP8"),
        (FP8, "layers.3.mlp.experts.gate_up_proj", "FP8"),
        (FP8, "layers.3.mlp.gate.weight", None),
        (FP8, "layers.3.mlp.gate_proj.weight", "FP8"),
        (FP8, "embed_tokens.weight", None),
        (FP8, "lm_head.weight", None),
        (GPT_OSS, "layers.0.self_attn.q_proj.weight", None),
        (GPT_OSS, "layers.0.mlp.experts.down_proj", "MXFP4"),
        (GPT_OSS, "layers.0.mlp.experts.down_proj_bias", None),
        (KIMI, "layers.1.mlp.experts.gate_up_proj", "INT4"),
        (KIMI, "layers.1.mlp.shared_experts.up_proj.weight", None),
        (KIMI, "layers.0.mlp.down_proj.weight", None),
        (KIMI, "layers.0.self_attn.kv_b_proj.weight", None),
        (KIMI, "layers.1.mlp.gate.weight", None),
        (MODELOPT, "layers.0.mlp.experts.down_proj", "NVFP4"),
        (MODELOPT, "layers.0.mlp.shared_expert.down_proj.weight", None),
        (MODELOPT, "layers.0.linear_attn.out_proj.weight", None),
        (MODELOPT, "layers.1.linear_attn.out_proj.weight", "NVFP4"),
    ],
)
def test_a_tensor_is_packed_as_the_configuration_says(quantization, name, label):
    packed = scheme(quantization).format_of(name)
    assert (packed and packed.label) == label


@pytest.mark.parametrize(
    ("quantization", "bytes_of_a_stack"),
    [
        (FP8, 2 * (256 * 384 + 2 * 3 * 4)),
        (GPT_OSS, 2 * 256 * (384 // 2 + 384 // 32)),
        (KIMI, 2 * 256 * (384 // 2 + 2 * 384 // 32)),
        (MODELOPT, 2 * (256 * (384 // 2 + 384 // 16) + 4)),
    ],
)
def test_packed_bytes_are_those_of_codes_and_scales(quantization, bytes_of_a_stack):
    assert scheme(quantization).bytes("layers.1.mlp.experts.down_proj", (2, 256, 384), 2) == bytes_of_a_stack
    assert scheme(quantization).bytes("layers.1.input_layernorm.weight", (384,), 2) == 2 * 384


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "awq"}, "'awq' is not supported"),
        ({"quant_method": "fp8"}, "weight_block_size is not set"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2' is not e4m3"),
        ({**FP8, "weight_block_size": 128}, "'fp8' is not supported"),
        ({**KIMI, "config_groups": {"all": {"weights": {**INT4_WEIGHTS, "symmetric": False}}}}, "symmetric False"),
        ({**KIMI, "config_groups": {"all": {"weights": {**INT4_WEIGHTS, "num_bits": 8}}}}, "config_groups.all has 8"),
        ({**KIMI, "format": "marlin-24"}, "format 'marlin-24'"),
        ({**MODELOPT, "quant_algo": "W4A8_AWQ"}, "quant_algo is W4A8_AWQ"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_cure(quantization, reason):
    with pytest.raises(CheckpointError, match=reason) as refused:
        scheme(quantization)
    assert "take the unquantized checkpoint, or one in fine-grained FP8" in str(refused.value)


def test_the_configuration_is_found_beside_the_text_tower_in_it_or_in_modelopts_own_file(tmp_path):
    text = {"model_type": "qwen3", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
    text["max_position_embeddings"] = 16
    config = tmp_path / "config.json"
    for raw in (
        {"text_config": text, "quantization_config": FP8},
        {"text_config": {**text, "quantization_config": FP8}},
    ):
        config.write_text(json.dumps(raw))
        assert read_target_config(tmp_path).quantization == FP8
    config.write_text(json.dumps(text))
    assert scheme_of(read_target_config(tmp_path)) is None
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    found = scheme_of(read_target_config(tmp_path))
    assert found is not None
    assert found.formats[0].label == "NVFP4"
    assert found.ignores("lm_head.weight")
