"""A drafter with random weights in any shape, without a checkpoint: a step costs the same whatever the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from drafter_service.fused import FusedDFlash
from drafter_service.loading import LoadedDrafter
from drafter_service.model import DFlashModel
from modeling.dflash import DFlashConfig
from modeling.dflash_config import DFlash2
from modeling.fixed_linear import fixed_linear


@dataclass(frozen=True)
class DrafterShape:
    """Dimensions of a full-attention drafter. second: what makes it DFlash 2, None for DFlash."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    block_size: int
    second: DFlash2 | None = None

    @property
    def weights(self) -> int:
        """Numbers that a draft reads: the layers, the head, and the selector but for its codebooks' few rows."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        layer, selector = attention + 3 * self.hidden * self.intermediate, 0
        if (second := self.second) is not None:
            layer += 4 * second.conv_kernel_size * self.hidden * (1 + self.hidden // second.conv_group_size)
            selector = second.selector_rank * self.hidden
        return self.layers * layer + selector + self.vocabulary * self.hidden

    @property
    def row(self) -> int:
        """Numbers of one token's context KV."""
        return self.layers * 2 * self.kv_heads * self.head_dim


QWEN3_8B = DrafterShape(4096, 5, 32, 8, 128, 12_288, 151_936, 16)
QWEN3_8B_SECOND = replace(QWEN3_8B, second=DFlash2(2, 16, 256, 16))


def random_drafter(shape: DrafterShape, window: int, dtype: torch.dtype, device: str) -> LoadedDrafter:
    """Normal weights, small enough that nothing overflows."""
    raw: dict[str, Any] = {
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
    if shape.second is not None:
        raw["architectures"] = ["DFlash2DraftModel"]
        raw["dflash_config"] |= asdict(shape.second)
    config = DFlashConfig.from_dict(raw, Path("random"))
    with torch.device("meta"):
        model = DFlashModel(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.rotary = DFlashModel(DFlashConfig.from_dict(raw | {"num_hidden_layers": 0}, Path("random"))).rotary
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 3:  # what a convolution adds to its weights
            tensor.normal_(std=0.5)
        elif tensor.ndim == 2:
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
