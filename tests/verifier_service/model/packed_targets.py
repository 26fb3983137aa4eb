"""Tiny targets whose checkpoints are packed as published, beside stock models with the same dequantized weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tests.modeling.quantized import packing
from tests.verifier_service.model import tiny_targets

Pack = Callable[[torch.Tensor], packing.Stored]
_LINEAR = r"(_proj|in_proj_qkv|in_proj_z)\.weight$"


@dataclass(frozen=True)
class PackedTarget:
    """family: of tiny_targets. pack: a matrix [out, in]. packs: which tensors, a regular expression of their names in
    transformers' model. quantization: as in config.json. body: what the text model's names begin with instead of
    `model.`. beside: further tensors of the checkpoint, of no use. overrides: of the configuration."""

    family: str
    pack: Pack
    packs: str
    quantization: Mapping[str, Any]
    body: str = "model."
    beside: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def build(self, directory: Path) -> PreTrainedModel:
        """The stock model with dequantized weights; the packed checkpoint in `directory`."""
        model = tiny_targets.make(self.family, **self.overrides)
        stored = {name: torch.zeros(2) for name in self.beside}
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                for end, part in self._packed(name, tensor).items():
                    name_there = end if end.startswith("lm_head") else self.body + end.removeprefix("model.")
                    stored[name_there] = part.contiguous()
        directory.mkdir(parents=True, exist_ok=True)
        save_file(stored, directory / "model.safetensors")
        self._save_config(model, directory)
        return model

    def _packed(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored of a tensor of the model; the tensor gets the dequantized values."""
        if not re.search(self.packs, name):
            return _singles(name, tensor)
        if self.family == "gpt_oss":  # [experts, in, out]
            return self._stack(name, tensor)
        stored: dict[str, torch.Tensor] = {}
        for single, matrix in _singles(name, tensor).items():
            parts, dense = self.pack(matrix.float())
            matrix.copy_(dense)
            stored |= {single.removesuffix(".weight") + end: part for end, part in parts.items()}
        return stored

    def _stack(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        packed = [self.pack(matrix.t().contiguous()) for matrix in tensor]
        for matrix, (_, dense) in zip(tensor, packed, strict=True):
            matrix.copy_(dense.t())
        return {name + end: torch.stack([parts[end] for parts, _ in packed]) for end in packed[0][0]}

    def _save_config(self, model: PreTrainedModel, directory: Path) -> None:
        text = model.config.to_dict()
        raw = text if self.body == "model." else {"model_type": _OUTER[self.family], "text_config": text}
        (directory / "config.json").write_text(json.dumps({**raw, "quantization_config": self.quantization}))


def _singles(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A fused tensor of experts as views, one for each projection of each expert, as published; others as they are."""
    prefix, _, kind = name.partition(".experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
    if parts is None:
        return {name: tensor}
    return {
        f"{prefix}.experts.{expert}.{part}.weight": matrix
        for expert, fused in enumerate(tensor)
        for part, matrix in zip(parts, fused.chunk(len(parts)), strict=True)
    }


_OUTER = {"qwen3_5_moe": "qwen3_5_moe", "deepseek_v3": "kimi_k25"}
_TOWER: dict[str, Any] = {
    "body": "model.language_model.",
    "beside": ("model.visual.patch_embed.proj.weight", "mtp.fc.weight"),
}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}

TARGETS: Mapping[str, PackedTarget] = {
    "fp8 qwen3": PackedTarget(  # blocks that neither a shard nor the matrix is a multiple of
        "qwen3",
        lambda matrix: packing.fp8(matrix, (24, 40)),
        _LINEAR,
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 40], "activation_scheme": "dynamic"},
    ),
    "fp8 qwen3_5_moe": PackedTarget(
        "qwen3_5_moe",
        lambda matrix: packing.fp8(matrix, (16, 16)),
        rf"{_LINEAR}|\.experts\.(gate_up|down)_proj",
        {
            "quant_method": "fp8",
            "weight_block_size": [16, 16],
            "modules_to_not_convert": ["lm_head", "mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_[ab]"],
        },
        **_TOWER,
    ),
    "fp8 deepseek_v3": PackedTarget(  # kv_b_proj too, and a layer that predicts a second token
        "deepseek_v3",
        lambda matrix: packing.fp8(matrix, (16, 16)),
        rf"{_LINEAR}|_proj_with_mqa\.weight|\.experts\.(gate_up|down)_proj",
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        beside=("model.layers.3.eh_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ),
    "mxfp4 gpt_oss": PackedTarget(
        "gpt_oss",
        packing.mxfp4,
        r"\.experts\.(gate_up|down)_proj$",
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    ),
    "int4 kimi": PackedTarget(
        "deepseek_v3",
        packing.int4,
        r"\.experts\.(gate_up|down)_proj",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": [
                "lm_head",
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            ],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4}},
        },
        body="language_model.model.",
        beside=("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight"),
    ),
    "nvfp4 qwen3_5_moe": PackedTarget(
        "qwen3_5_moe",
        lambda matrix: packing.nvfp4(matrix, modelopt=False),
        r"\.experts\.(gate_up|down)_proj",
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "ignore": ["lm_head", "re:.*linear_attn.*", "re:.*self_attn.*", "re:.*shared_expert.*"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _NVFP4}},
        },
        **_TOWER,
    ),
    "nvfp4 of modelopt qwen3_5_moe": PackedTarget(
        "qwen3_5_moe",
        lambda matrix: packing.nvfp4(matrix, modelopt=True),
        r"self_attn\.[qkvo]_proj\.weight|\.experts\.(gate_up|down)_proj|lm_head",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*.shared_expert.*", "*linear_attn*"]},
        **_TOWER,
    ),
}
