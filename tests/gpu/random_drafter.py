"""A drafter with random weights in any shape, without a checkpoint: a step costs the same whatever the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from drafter_service.fused import FusedDFlash
from drafter_service.loading import LoadedDrafter
from drafter_service.model import DFlashModel
from modeling.dflash import DFlashConfig
from modeling.fixed_linear import fixed_linear


@dataclass(frozen=True)
class DrafterShape:
    """Dimensions of a full-attention drafter."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    block_size: int

    @property
    def weights(self) -> int:
        """Numbers that a draft reads: the layers and the head."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.vocabulary * self.hidden

    @property
    def row(self) -> int:
        """Numbers of one token's context KV."""
        return self.layers * 2 * self.kv_heads * self.head_dim


QWEN3_8B = DrafterShape(4096, 5, 32, 8, 128, 12_288, 151_936, 16)


def random_drafter(shape: DrafterShape, window: int, dtype: torch.dtype, device: str) -> LoadedDrafter:
    """Normal weights, small enough that nothing overflows."""
    raw = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "vocab_size": shape.vocabulary,
        "num_target_layers": 2,
        "block_size": shape.block_size,
        "dflash_config": {"target_layer_ids": [0], "mask_token_id": 1},
    }
    config = DFlashConfig.from_dict(raw, Path("random"))
    with torch.device("meta"):
        model = DFlashModel(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.rotary = DFlashModel(DFlashConfig.from_dict(raw | {"num_hidden_layers": 0}, Path("random"))).rotary
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2:
            tensor.normal_(std=tensor.shape[1] ** -0.5)
        else:
            tensor.fill_(1.0) if name.endswith("weight") else tensor.zero_()
    embedding, head = torch.randn(2, shape.vocabulary, shape.hidden, device=device, dtype=dtype).unbind()
    head *= shape.hidden**-0.5
    return LoadedDrafter(
        config=config,
        model=FusedDFlash(model),
        embedding=embedding,
        head=fixed_linear(head),
        window=window,
        vocabulary=shape.vocabulary,
        target_fingerprint="",
        feature_version="",
        drafter_version="",
        head_weight=head,
    )
