"""The DFlash draft model (arXiv 2602.06036), checkpoint-compatible with z-lab/dflash.

A block is [bonus token, mask, mask, ...] at positions base, base+1, ...; each layer attends from the block's rows to
(context KV ++ the block's own KV). Context KV comes from context features and is independent per token, so it is made
once per token by `context_kv` and kept; the block's KV is thrown away. The target's embedding and head stand outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, rotate_half

from modeling.dflash import SLIDING, DFlashConfig, DraftCheckpointError, read_weights

PADDING = 1 << 40  # a context position that no block may see
LayerKV = tuple[Tensor, Tensor]  # keys, values: [..., kv_heads, context, head_dim]


class DFlashModel(nn.Module):
    """fc and hidden_norm (fused features), layers, final norm. Parameters carry the checkpoint's names."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.dflash = config
        qwen3 = Qwen3Config(**{k: v for k, v in config.raw.items() if k not in ("architectures", "auto_map")})
        eps = qwen3.rms_norm_eps
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden, config.hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden, eps=eps)
        self.heads, self.kv_heads, self.head_dim = _head_counts(qwen3)
        self.layers = cast(Iterable[DraftLayer], nn.ModuleList(DraftLayer(qwen3) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(config.hidden, eps=eps)
        self.rotary = Qwen3RotaryEmbedding(qwen3)

    @classmethod
    def load(cls, directory: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> DFlashModel:
        """A published checkpoint, ready for inference. Raises DraftCheckpointError naming what does not fit."""
        config = DFlashConfig.load(directory)
        model = cls(config)
        weights = read_weights(config.directory)
        expected = model.state_dict()
        unknown = sorted(name for name in weights if name not in expected and not name.endswith("inv_freq"))
        if unknown:
            raise DraftCheckpointError(
                f"drafter checkpoint {str(directory)!r} holds {len(unknown)} tensors that are not of a DFlash model "
                f"({', '.join(unknown[:3])}): it is of another kind (DFlash 2, EAGLE, ...), which is not supported"
            )
        for name, tensor in expected.items():
            if name not in weights:
                raise DraftCheckpointError(f"drafter checkpoint {str(directory)!r} lacks the tensor {name!r}")
            if weights[name].shape != tensor.shape:
                raise DraftCheckpointError(
                    f"drafter checkpoint {str(directory)!r}: {name} is {tuple(weights[name].shape)}, "
                    f"config.json asks for {tuple(tensor.shape)}"
                )
        model.load_state_dict({name: weights[name] for name in expected})
        return model.to(device=device, dtype=dtype).eval().requires_grad_(False)

    def features(self, taps: Tensor) -> Tensor:
        """Context features [..., hidden] of concatenated tap-layer outputs [..., taps x hidden]."""
        return self.hidden_norm(self.fc(taps))

    def context_kv(self, features: Tensor, positions: Tensor) -> list[LayerKV]:
        """Per layer, keys (normed, rotated) and values of context features.

        features [N, C, hidden], positions [N, C] int64 -> keys, values [N, kv_heads, C, head_dim].
        """
        rope = self.rotary(features, positions.clamp(max=PADDING - 1))
        return [layer.self_attn.keys_values(features, rope) for layer in self.layers]

    def forward(
        self, embeddings: Tensor, positions: Tensor, context: Sequence[LayerKV], masks: Sequence[Tensor]
    ) -> Tensor:
        """Hidden states [N, Q, hidden], after the final norm, of block rows (embedded by the target's embedding).

        positions [N, Q] int64; context: `context_kv` per layer; masks: per layer, see `block_masks`.
        """
        rope = self.rotary(embeddings, positions)
        hidden = embeddings
        for layer, kv, mask in zip(self.layers, context, masks):
            hidden = layer(hidden, rope, kv, mask)
        return self.norm(hidden)


def block_masks(config: DFlashConfig, positions: Tensor, bases: Tensor, context_positions: Tensor) -> list[Tensor]:
    """Per layer, which keys (context ++ block rows) each row sees: bool [N, Q, C + Q].

    positions, bases [N, Q]: of each row and of its block's bonus token (rows of several blocks may stand side by side);
    context_positions [N, C], PADDING where there is none. A block sees the context before its base and itself; in
    sliding layers only keys less than `sliding_window` back; in causal layers no later rows.
    """
    context_seen = context_positions[:, None, :] < bases[:, :, None]
    block_seen = bases[:, :, None] == bases[:, None, :]
    keys = torch.cat([context_positions, positions], dim=1)
    return layer_masks(config, positions, keys, torch.cat([context_seen, block_seen], dim=2))


def layer_masks(config: DFlashConfig, positions: Tensor, keys: Tensor, seen: Tensor) -> list[Tensor]:
    """Per layer, `seen` [N, Q, K] without what its kind of attention hides. keys [N, K]: their positions."""
    ahead = keys[:, None, :] - positions[:, :, None]
    cache: dict[tuple[bool, bool], Tensor] = {}
    masks = []
    for kind, causal in zip(config.layer_types, config.causal):
        sliding = kind == SLIDING
        if (sliding, causal) not in cache:
            mask = seen
            if causal:
                mask = mask & (ahead <= 0)
            if sliding and config.sliding_window is not None:
                mask = mask & (ahead.abs() < config.sliding_window)
            cache[sliding, causal] = mask
        masks.append(cache[sliding, causal])
    return masks


class DraftLayer(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = DraftMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], context: LayerKV, mask: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, context, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DraftAttention(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        heads, kv_heads, self.head_dim = _head_counts(config)
        self.grouped = heads != kv_heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> LayerKV:
        keys = self.k_norm(self._heads(self.k_proj(x)))
        return _rotate(keys, rope), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: LayerKV, mask: Tensor) -> Tensor:
        query = _rotate(self.q_norm(self._heads(self.q_proj(x))), rope)
        keys, values = self.keys_values(x, rope)
        out = F.scaled_dot_product_attention(
            query,
            torch.cat([context[0], keys], dim=2),
            torch.cat([context[1], values], dim=2),
            attn_mask=mask[:, None],
            enable_gqa=self.grouped,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [N, heads, tokens, head_dim]


class DraftMLP(nn.Module):
    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _head_counts(config: Qwen3Config) -> tuple[int, int, int]:
    """Query heads, key-value heads, head dimension."""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads or heads, config.head_dim


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope[0].unsqueeze(1), rope[1].unsqueeze(1)
    return x * cos + rotate_half(x) * sin
