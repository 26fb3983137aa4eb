"""The DFlash model arranged for serving: the same arithmetic in fewer, fatter operations.

Projections of one input are one GEMM (q, k and v; gate and up; keys and values of a context row for all layers at
once), rows of all blocks stand in one flat batch, and attention is left to a function that knows where the context is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafter_service.block_conv import FusedConv
from drafter_service.model import DFlashModel, DraftLayer
from drafter_service.selector import FusedSelector
from kernels.block_conv.reference import convolve_block
from modeling.dflash import SLIDING
from modeling.fixed_linear import fixed_linear

# (layer, query [T, heads, head_dim], key-value rows of the blocks [T, 2, kv_heads, head_dim]) -> [T, heads * head_dim]
Attend = Callable[[int, Tensor, Tensor], Tensor]


class FusedLayer:
    """Weights of one layer. qkv: q, k and v heads, in this order; qk_norm [heads + kv_heads, head_dim] is query_norm
    and key_norm [head_dim], once a head."""

    def __init__(self, layer: DraftLayer, heads: int, kv_heads: int):
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm = layer.input_layernorm.weight.detach()
        self.post_norm = layer.post_attention_layernorm.weight.detach()
        self.qkv = fixed_linear(*_stacked([attention.q_proj, attention.k_proj, attention.v_proj]))
        norms = [attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv_heads, -1)]
        self.qk_norm = torch.cat(norms).detach()
        self.query_norm, self.key_norm = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
        self.o = fixed_linear(attention.o_proj.weight, attention.o_proj.bias)
        self.gate_up = fixed_linear(*_stacked([mlp.gate_proj, mlp.up_proj]))
        self.down = fixed_linear(mlp.down_proj.weight)
        self.attention_conv = FusedConv(layer.attention_conv) if layer.attention_conv is not None else None
        self.mlp_conv = FusedConv(layer.mlp_conv) if layer.mlp_conv is not None else None


class FusedDFlash:
    """Inference only, under `torch.inference_mode`. Holds its own copies of the weights: `model` may be let go."""

    def __init__(self, model: DFlashModel):
        self.config = model.dflash
        self.eps = model.shape.eps
        self.masked = any(self.config.causal) or SLIDING in self.config.layer_types  # may a row not see a key?
        self.rotary = model.rotary
        selector = model.candidate_selector
        self.selector = FusedSelector(selector) if selector is not None else None
        shape = model.shape
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.norm = model.norm.weight.detach()
        self.dtype, self.device = self.norm.dtype, self.norm.device
        self.layers = [FusedLayer(layer, self.heads, self.kv_heads) for layer in model.layers]
        attentions = [layer.self_attn for layer in model.layers]
        self._context = fixed_linear(*_stacked([p for each in attentions for p in (each.k_proj, each.v_proj)]))
        self._context_norm = torch.stack([layer.qk_norm[self.heads :] for layer in self.layers])[:, None]

    @property
    def row_bytes(self) -> int:
        """Keys and values of one context token in all layers."""
        return len(self.layers) * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def project_context(self, features: Tensor) -> Tensor:
        """[T, layers x 2 x kv_heads x head_dim]: for each layer key heads, not normed yet, and value heads."""
        return self._context(features.to(self.dtype))

    def context_rows(self, features: Tensor, positions: Tensor) -> Tensor:
        """Keys (normed, rotated) and values of context features [T, hidden]: [layers, T, 2, kv_heads, head_dim].

        positions [T] int64. What is not a finite number becomes 0, so that no context can spoil another's arithmetic.
        """
        rows = (
            self.project_context(features)
            .view(len(features), len(self.layers), 2, self.kv_heads, self.head_dim)
            .transpose(0, 1)
        )
        keys = F.rms_norm(rows[:, :, 0], (self.head_dim,), None, self.eps) * self._context_norm
        return torch.stack([_rotate(keys, *self._rope(positions)), rows[:, :, 1]], dim=2).nan_to_num_(0.0, 0.0, 0.0)

    def forward(self, hidden: Tensor, positions: Tensor, attend: Attend, places: Tensor) -> Tensor:
        """Hidden states [T, hidden], before the final norm, of block rows [T, hidden] at positions [T] int64.

        places [T] int64: of the rows in their blocks, 0 for the bonus token.
        """
        cos, sin = self._rope(positions)
        rotated = self.heads + self.kv_heads
        width = (hidden.shape[1],)
        for index, layer in enumerate(self.layers):
            x = F.rms_norm(hidden, width, layer.input_norm, self.eps)
            if (conv := layer.attention_conv) is not None:
                mixing = conv.weights(x)
                x = convolve_block(x, mixing[:, 0], conv.base[0], places)
            qkv = layer.qkv(x).view(len(x), -1, self.head_dim)
            qk = F.rms_norm(qkv[:, :rotated], (self.head_dim,), None, self.eps) * layer.qk_norm
            qk = _rotate(qk, cos, sin)
            kv = torch.stack([qk[:, self.heads :], qkv[:, rotated:]], dim=1)
            out = layer.o(attend(index, qk[:, : self.heads], kv))
            if conv is not None:
                out = convolve_block(out, mixing[:, 1], conv.base[1], places)
            hidden = hidden + out
            x = F.rms_norm(hidden, width, layer.post_norm, self.eps)
            if (conv := layer.mlp_conv) is not None:
                mixing = conv.weights(x)
                x = convolve_block(x, mixing[:, 0], conv.base[0], places)
            gate, up = layer.gate_up(x).chunk(2, dim=-1)
            out = layer.down(F.silu(gate) * up)
            if conv is not None:
                out = convolve_block(out, mixing[:, 1], conv.base[1], places)
            hidden = hidden + out
        return hidden

    def final_norm(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.norm, self.eps)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, head_dim]; the sign of rotate_half is already in sin."""
        cos, sin = self.rotary(self.norm, positions[:, None])
        first, second = sin.chunk(2, dim=-1)
        return cos, torch.cat([-first, second], dim=-1)


def _stacked(projections: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases (all have one, or none) of projections of one input, as one projection."""
    weight = torch.cat([projection.weight for projection in projections])
    biases: list[Tensor] = [projection.bias for projection in projections if projection.bias is not None]
    return weight, torch.cat(biases) if biases else None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, heads, head_dim] times cos, plus its halves swapped times the signed sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
