"""What a latent-attention layer does between its projections and its attention, in plain torch."""

from __future__ import annotations

import torch


def append_latents(
    compressed: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    scales: torch.Tensor | None = None,
    *,
    interleaved: bool,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise and store latents, rotate and store rotary keys, return the rotated queries [tokens, heads, rotary].

    compressed [tokens, latent + rotary]: the projection that latent and rotary key come from. The latent's RMSNorm,
    times norm_weight [latent], is rounded to compressed's dtype. query [tokens, heads, rotary]: the queries' rotary
    parts. cos, sin [tokens, rotary], both halves alike. interleaved: a rotary pair's two entries are neighbours, else
    they lie half the width apart; results are always in the latter order. Rotates in float32.
    latents [blocks, block_tokens, latent] and rotary [blocks, block_tokens, rotary] are written in place, in their own
    dtypes; they may be views of one cache. rows int [tokens]: block * block_tokens + offset, all different; a negative
    one is a padding token, which is not stored. scales [blocks, block_tokens] of e4m3 latents get for each the power of
    two by which its largest element is stored as 224 to 448, and the latent is stored divided by it.
    output: where the rotated queries go, such as the last columns of the attention's queries; None makes a tensor.
    Raises ValueError for shapes that do not fit.
    """
    check_arguments(compressed, norm_weight, query, cos, sin, rows, latents, rotary, scales, output)
    latent, key = compressed.split([latents.shape[2], rotary.shape[2]], dim=-1)
    wide = latent.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm_weight.float()
    stored = rows >= 0
    at = rows[stored].long()
    block, offset = at // latents.shape[1], at % latents.shape[1]
    normed = wide.to(compressed.dtype)[stored]
    if scales is not None:
        _, exponents = torch.frexp(normed.float().abs().amax(dim=-1).clamp_min(2.0**-100) / 448)
        own = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
        scales[block, offset] = own.to(scales.dtype)
        normed = normed / own[:, None]
    # fp8 tensors can be indexed as bytes only
    stored_as = torch.uint8 if latents.dtype.itemsize == 1 else latents.dtype
    latents.view(stored_as)[block, offset] = normed.to(latents.dtype).view(stored_as)
    rotary[block, offset] = _rotate(key[:, None], cos, sin, interleaved)[stored, 0].to(rotary.dtype)
    rotated = _rotate(query, cos, sin, interleaved)
    return rotated if output is None else output.copy_(rotated)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [tokens, heads, rotary]."""
    half = x.shape[2] // 2
    cosine, sine = cos[:, None, :half].float(), sin[:, None, :half].float()
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.split(half, dim=-1)
    first, second = first.float(), second.float()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def check_arguments(
    compressed: torch.Tensor,
    norm_weight: torch.Tensor,
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rows: torch.Tensor,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    scales: torch.Tensor | None,
    output: torch.Tensor | None,
) -> None:
    """Raises ValueError naming the argument that does not fit the others. Looks at shapes only, never at contents."""
    tokens, width, turning = compressed.shape[0], latents.shape[-1], rotary.shape[-1]
    if latents.dim() != 3 or rotary.shape[:-1] != latents.shape[:2] or turning % 2:
        raise ValueError(
            f"latents {tuple(latents.shape)} and rotary {tuple(rotary.shape)} must be [blocks, block_tokens, latent] "
            "and [blocks, block_tokens, rotary], with an even rotary width"
        )
    for name, tensor, shape in (
        ("compressed", compressed, (tokens, width + turning)),
        ("norm_weight", norm_weight, (width,)),
        ("query", query, (tokens, *query.shape[1:2], turning)),
        ("cos", cos, (tokens, turning)),
        ("sin", sin, (tokens, turning)),
        ("rows", rows, (tokens,)),
        ("output", query if output is None else output, query.shape),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {tuple(shape)}")
    if scales is not None and (scales.shape != latents.shape[:2] or not scales.is_contiguous()):
        raise ValueError(f"scales {tuple(scales.shape)} must be {tuple(latents.shape[:2])}, contiguous")
