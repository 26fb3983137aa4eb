"""The table of families: for each a tiny target of the same features, in the layout that its checkpoints have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, Qwen3_5Config, Qwen3_5MoeConfig

from tests.verifier_service.model import tiny_targets

HEAD_DIM = 16
WIDER = 2.0  # logits so many times further apart than random weights make them: fewer ties

Tensors = dict[str, torch.Tensor]
Publish = Callable[[PreTrainedModel, Path], None]


def _as_saved(model: PreTrainedModel, directory: Path) -> None:
    """As transformers writes it: experts one by one where they are published so; several files and an index."""
    model.save_pretrained(directory, max_shard_size="200KB")


def _beside_a_predictor(model: PreTrainedModel, directory: Path) -> None:
    """Qwen3-Next: with the weights of multi-token prediction, which a verifier has no use for."""
    model.save_pretrained(directory)  # a single file
    save_file({"mtp.fc.weight": torch.zeros(2)}, directory / "model-mtp.safetensors")


def _multimodal(model: PreTrainedModel, directory: Path) -> None:
    """Qwen3.5 and 3.6: the text tower under model.language_model, experts fused, beside a vision tower and mtp."""
    kind = Qwen3_5MoeConfig if "moe" in model.config.model_type else Qwen3_5Config
    tied = model.config.tie_word_embeddings
    kind(text_config=model.config.to_dict(), tie_word_embeddings=tied).save_pretrained(directory)
    tower = {name.replace("model.", "model.language_model.", 1): x for name, x in _state(model).items()}
    others = {"model.visual.patch_embed.proj.weight": torch.zeros(2), "mtp.norm.weight": torch.zeros(2)}
    save_file(tower | others, directory / "model.safetensors")


def _kimi(model: PreTrainedModel, directory: Path) -> None:
    """Kimi-K2.5: a DeepSeek-V3 text tower of a type that transformers lacks, older names of its rotary settings."""
    text = model.config.to_dict()
    rope = text.pop("rope_parameters")
    text |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    config = {"model_type": "kimi_k25", "text_config": text, "vision_config": {"depth": 1}}
    (directory / "config.json").write_text(json.dumps(config))
    tower: Tensors = {}
    for name, tensor in _state(model).items():
        for part, single in _singles(name, tensor):
            tower[f"language_model.{part}"] = single.contiguous()
    save_file(tower | {"vision_tower.patch_embed.proj.weight": torch.zeros(2)}, directory / "model.safetensors")


def _singles(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A fused tensor of experts as one tensor for each projection of each expert; any other as it is."""
    prefix, experts, kind = name.partition(".experts.")
    if not experts:
        return [(name, tensor)]
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return [
        (f"{prefix}.experts.{expert}.{part}.weight", matrix)
        for expert, fused in enumerate(tensor)
        for part, matrix in zip(parts, fused.chunk(len(parts)), strict=True)
    ]


def _state(model: PreTrainedModel) -> Tensors:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@dataclass(frozen=True)
class Row:
    """family: of tiny_targets. overrides: of its configuration. sizes: tensor-parallel degrees that are proved.

    attending: layers that cache keys and values, of kv_heads heads of HEAD_DIM, or latents of so many values.
    replicated: a regular expression of the tensors that every rank holds whole, beside norms and the embedding.
    """

    family: str
    attending: int
    overrides: Mapping[str, Any] = field(default_factory=dict)
    kv_heads: int = 4
    latent: int | None = None
    sizes: tuple[int, ...] = (1, 2)
    publish: Publish = _as_saved
    replicated: str = r"mlp\.gate\.|shared_expert_gate|o_proj\.bias"

    def build(self, directory: Path) -> PreTrainedModel:
        """The stock model, its checkpoint in `directory`."""
        model = tiny_targets.make(self.family, **self.overrides)
        if not model.config.tie_word_embeddings:
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(WIDER)
        directory.mkdir(parents=True, exist_ok=True)
        self.publish(model, directory)
        return model

    def kv_values(self, size: int) -> int:
        """What each of `size` ranks caches for one token. Latents and heads fewer than ranks are held several times."""
        return self.attending * (self.latent or 2 * max(1, self.kv_heads // size) * HEAD_DIM)

    def share(self, name: str, shape: tuple[int, ...], rank: int, size: int) -> int:
        """Entries of a tensor that a rank should hold."""
        whole = prod(shape)
        if re.search(rf"norm|embed_tokens|{self.replicated}", name):
            return whole
        if name == "lm_head.weight":  # rows of an uneven vocabulary: the last rank has the rest
            most = -(-shape[0] // size)
            return (min((rank + 1) * most, shape[0]) - rank * most) * shape[1]
        if re.search(r"\.[kv]_proj", name):
            return whole // min(size, self.kv_heads)
        assert whole % size == 0, f"{name} of shape {shape} does not divide among {size} ranks"
        return whole // size


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_UNTIED = {"rope_parameters": _LLAMA3, "tie_word_embeddings": False, "attention_bias": False}
_TIED = {"tie_word_embeddings": True}
_TWO_HEADS = {"num_key_value_heads": 2}  # as published, and half as many as the most ranks

ROWS: Mapping[str, Row] = {
    "llama": Row("llama", 3, _UNTIED),
    "qwen3": Row("qwen3", 3, kv_heads=1),
    "qwen3-tied": Row("qwen3", 3, {**_TIED, "num_key_value_heads": 4}),
    "qwen3_moe": Row("qwen3_moe", 3),
    "qwen3_next": Row("qwen3_next", 1, publish=_beside_a_predictor),
    "qwen3_5": Row("qwen3_5", 1, publish=_multimodal),
    "qwen3_5-tied": Row("qwen3_5", 1, _TIED, publish=_multimodal),
    "qwen3_5_moe": Row("qwen3_5_moe", 1, _TWO_HEADS, kv_heads=2, sizes=(1, 2, 4), publish=_multimodal),
    "gpt_oss": Row("gpt_oss", 3, replicated=r"router|o_proj\.bias|down_proj_bias"),
    "kimi_k25": Row("deepseek_v3", 3, latent=32 + 8, sizes=(1, 2, 4), publish=_kimi, replicated=r"mlp\.gate\.|_a_proj"),
}
