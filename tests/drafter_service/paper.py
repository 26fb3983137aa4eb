"""DFlash (arXiv 2602.06036) and DFlash 2 read slowly: one block, loops over layers, rows, heads; nothing of ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def block_hidden(
    config: dict[str, Any], weights: dict[str, Tensor], features: Tensor, first: int, embeddings: Tensor, base: int
) -> Tensor:
    """Hidden states [rows, hidden] after the final norm. features [C, hidden] of the positions first..first+C-1 < base.

    embeddings [rows, hidden]: of the bonus token, at position base, and of the masks behind it.
    """
    eps, head_dim = config["rms_norm_eps"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = [row.double() for row in embeddings]
    places = [base + r for r in range(len(rows))]
    for index in range(config["num_hidden_layers"]):

        def w(name: str, index: int = index) -> Tensor:
            return weights[f"layers.{index}.{name}.weight"].double()

        def project(name: str, x: Tensor, index: int = index) -> Tensor:
            bias = weights.get(f"layers.{index}.self_attn.{name}.bias")
            return w(f"self_attn.{name}") @ x + (0 if bias is None else bias.double())

        def split(x: Tensor) -> list[Tensor]:
            return [x[h * head_dim : (h + 1) * head_dim] for h in range(len(x) // head_dim)]

        def key(x: Tensor, place: int) -> list[Tensor]:
            return [rotated(norm(k, w("self_attn.k_norm"), eps), place, config) for k in split(project("k_proj", x))]

        def around(
            branch: str, before: list[Tensor], rows: list[Tensor], which: int, index: int = index
        ) -> list[Tensor]:
            """`rows` convolved, in front of a branch (0) or behind it (1), as its input `before` says."""
            base = weights.get(f"layers.{index}.{branch}_conv.base_kernel")
            if base is None:
                return rows
            projection = weights[f"layers.{index}.{branch}_conv.kernel_projection.weight"].double()
            return convolved(rows, [projection @ x for x in before], base.double(), which)

        unmixed = [norm(x, w("input_layernorm"), eps) for x in rows]
        normed = around("attention", unmixed, unmixed, 0)
        seen = [(first + i, f.double()) for i, f in enumerate(features)] + list(zip(places, normed))
        keys = [key(x, place) for place, x in seen]
        values = [split(project("v_proj", x)) for _, x in seen]
        attended = []
        for r, place in enumerate(places):
            queries = split(project("q_proj", normed[r]))
            out = []
            for h, query in enumerate(queries):
                rotated_query = rotated(norm(query, w("self_attn.q_norm"), eps), place, config)
                kv = h // (heads // kv_heads)
                visible = [i for i, (other, _) in enumerate(seen) if sees(config, index, place, other)]
                scores = torch.stack([rotated_query @ keys[i][kv] / math.sqrt(head_dim) for i in visible])
                chances = torch.exp(scores - scores.max())
                chances = chances / chances.sum()
                out.append(sum(chance * values[i][kv] for chance, i in zip(chances, visible)))
            attended.append(project("o_proj", torch.cat(out)))
        rows = [x + out for x, out in zip(rows, around("attention", unmixed, attended, 1))]
        unmixed = [norm(x, w("post_attention_layernorm"), eps) for x in rows]
        fed = [feed_forward(x, w) for x in around("mlp", unmixed, unmixed, 0)]
        rows = [x + out for x, out in zip(rows, around("mlp", unmixed, fed, 1))]
    return torch.stack([norm(x, weights["norm.weight"].double(), eps) for x in rows])


def sees(config: dict[str, Any], layer: int, place: int, other: int) -> bool:
    sliding = config["layer_types"][layer] == "sliding_attention"
    causal = config.get("is_causal", sliding)
    if causal and other > place:
        return False
    return not sliding or abs(place - other) < config["sliding_window"]


def convolved(rows: list[Tensor], dynamic: list[Tensor], base: Tensor, which: int) -> list[Tensor]:
    """Row by row: channel c of the row t before weighs base[which, t, c] and its group's number in `dynamic`."""
    _, taps, channels = base.shape
    groups = len(dynamic[0]) // (2 * taps)
    out = []
    for r in range(len(rows)):
        mixed = torch.zeros_like(rows[r])
        for t in range(min(taps, r + 1)):
            for c in range(channels):
                own = dynamic[r][(which * taps + t) * groups + c // (channels // groups)]
                mixed[c] += (base[which, t, c] + own) * rows[r - t][c]
        out.append(mixed)
    return out


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).sum()) / len(x) + eps) * weight


def rotated(x: Tensor, place: int, config: dict[str, Any]) -> Tensor:
    """Rotary embedding of one head, pair (i, i + half) by the angle place * theta^(-2i/d)."""
    out, half = x.clone(), len(x) // 2
    for i in range(half):
        angle = place * config["rope_parameters"]["rope_theta"] ** (-2 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def feed_forward(x: Tensor, w: Any) -> Tensor:
    gate, up = w("mlp.gate_proj") @ x, w("mlp.up_proj") @ x
    return w("mlp.down_proj") @ (gate * torch.sigmoid(gate) * up)
