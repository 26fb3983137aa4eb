"""The DFlash draft model (arXiv 2602.06036) and DFlash 2, checkpoint-compatible with z-lab/dflash.

A block is [bonus token, mask, mask, ...] at positions base, base+1, ...; each layer attends from the block's rows to
(context KV ++ the block's own KV). Context KV comes from context features and is independent per token, so it is made
once per token by `context_kv` and kept; the block's KV is thrown away. The target's embedding and head stand outside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafter_service.block_conv import BlockConv
from drafter_service.rotary import Rotary, rotate
from drafter_service.selector import CandidateSelector
from modeling.dflash import SLIDING, DFlash2, DFlashConfig, DraftCheckpointError, read_weights

PADDING = 1 << 40  # a context position that no block may see
CODEBOOK = re.compile(r"(_codebook)\.weight$")  # published without `.weight`; transformers' own saving adds it
LayerKV = tuple[Tensor, Tensor]  # keys, values: [..., kv_heads, context, head_dim]


class DFlashModel(nn.Module):
    """fc and hidden_norm (fused features), layers, final norm. Parameters carry the checkpoint's names."""

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.dflash = config
        shape = LayerShape.of(config)
        eps = shape.eps
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden, config.hidden, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden, eps=eps)
        self.shape = shape
        layers = (DraftLayer(shape, config.v2) for _ in range(config.layers))
        self.layers = cast(Iterable[DraftLayer], nn.ModuleList(layers))
        self.norm = nn.RMSNorm(config.hidden, eps=eps)
        self.rotary = Rotary(config, shape.head_dim)
        self.candidate_selector = (
            CandidateSelector(config.hidden, config.vocabulary, config.v2) if config.v2 is not None else None
        )

    @classmethod
    def load(cls, directory: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> DFlashModel:
        """A published checkpoint, ready for inference. Raises DraftCheckpointError naming what does not fit."""
        config = DFlashConfig.load(directory)
        model = cls(config)
        weights = {CODEBOOK.sub(r"\1", name): tensor for name, tensor in read_weights(config.directory).items()}
        expected = model.state_dict()
        unknown = sorted(name for name in weights if name not in expected and not name.endswith("inv_freq"))
        if unknown:
            raise DraftCheckpointError(
                f"drafter checkpoint {str(directory)!r} holds {len(unknown)} tensors that are not of a DFlash model "
                f"({', '.join(unknown[:3])}): it is of another kind (EAGLE, ...), which is not supported, "
                f"or of DFlash 2, whose keys config.json lacks ({', '.join(field.name for field in fields(DFlash2))})"
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
        rope = self._rope(features, positions)
        return [layer.self_attn.keys_values(features, rope) for layer in self.layers]

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        context: Sequence[LayerKV],
        masks: Sequence[Tensor],
        places: Tensor,
    ) -> Tensor:
        """Hidden states [N, Q, hidden], after the final norm, of block rows (embedded by the target's embedding).

        positions, places [N, Q] int64: in the sequence, and in the row's own block, 0 for its bonus token; context:
        `context_kv` per layer; masks: per layer, see `block_masks`.
        """
        rope = self._rope(embeddings, positions)
        hidden = embeddings
        for layer, kv, mask in zip(self.layers, context, masks):
            hidden = layer(hidden, rope, kv, mask, places)
        return self.norm(hidden)

    def _rope(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(like, positions)  # [N, tokens, head_dim]
        return cos.unsqueeze(1), sin.unsqueeze(1)


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


@dataclass(frozen=True)
class LayerShape:
    """Dimensions of a draft layer, which are a Qwen3 layer's. eps: of all norms. bias: of the attention projections."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    bias: bool

    @classmethod
    def of(cls, config: DFlashConfig) -> LayerShape:
        """Raises DraftCheckpointError for a key that is missing or not supported."""
        raw, where = config.raw, config.directory / "config.json"
        for key in ("num_attention_heads", "intermediate_size"):
            if not isinstance(raw.get(key), int) or raw[key] < 1:
                raise DraftCheckpointError(f"{where}: {key} is {raw.get(key)!r}; it has to be a positive whole number")
        activation = raw.get("hidden_act") or "silu"
        if activation != "silu":
            raise DraftCheckpointError(f"{where}: hidden_act is {activation!r}; a DFlash drafter has 'silu'")
        heads = raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise DraftCheckpointError(f"{where}: num_attention_heads {heads} is no multiple of {kv_heads} key heads")
        return cls(
            hidden=config.hidden,
            intermediate=raw["intermediate_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=raw.get("head_dim") or config.hidden // heads,
            eps=raw.get("rms_norm_eps") or 1e-6,
            bias=bool(raw.get("attention_bias")),
        )


class DraftLayer(nn.Module):
    def __init__(self, shape: LayerShape, v2: DFlash2 | None):
        super().__init__()
        self.self_attn = DraftAttention(shape)
        self.mlp = DraftMLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.attention_conv = BlockConv(shape.hidden, v2) if v2 is not None else None
        self.mlp_conv = BlockConv(shape.hidden, v2) if v2 is not None else None

    def forward(
        self, hidden: Tensor, rope: tuple[Tensor, Tensor], context: LayerKV, mask: Tensor, places: Tensor
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(x, rope, context, mask)

        hidden = hidden + _convolved(self.attention_conv, self.input_layernorm(hidden), places, attend)
        return hidden + _convolved(self.mlp_conv, self.post_attention_layernorm(hidden), places, self.mlp)


def _convolved(conv: BlockConv | None, x: Tensor, places: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """branch(x), between its convolutions if it has any."""
    if conv is None:
        return branch(x)
    weights = conv.weights(x)
    return conv.mix(branch(conv.mix(x, weights, places, 0)), weights, places, 1)


class DraftAttention(nn.Module):
    def __init__(self, shape: LayerShape):
        super().__init__()
        self.head_dim = shape.head_dim
        self.grouped = shape.heads != shape.kv_heads
        self.q_proj = nn.Linear(shape.hidden, shape.heads * self.head_dim, bias=shape.bias)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * self.head_dim, bias=shape.bias)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * self.head_dim, bias=shape.bias)
        self.o_proj = nn.Linear(shape.heads * self.head_dim, shape.hidden, bias=shape.bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=shape.eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=shape.eps)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> LayerKV:
        keys = self.k_norm(self._heads(self.k_proj(x)))
        return rotate(keys, *rope), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], context: LayerKV, mask: Tensor) -> Tensor:
        query = rotate(self.q_norm(self._heads(self.q_proj(x))), *rope)
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
    def __init__(self, shape: LayerShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
