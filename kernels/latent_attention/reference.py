"""Latent attention in absorbed form in plain torch, request by request (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

import torch

from kernels.paged_batch import PagedBatch


def latent_attention(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    batch: PagedBatch,
    *,
    scaling: float,
    scales: torch.Tensor | None = None,
    split_tokens: int | None = None,
) -> torch.Tensor:
    """query [tokens, heads, latent + rotary] -> what its heads saw of the latents, [tokens, heads, latent].

    A head's query is mapped into latent space (U_h^T q_h), its rotary part behind. latents [blocks, block_tokens,
    latent] and rotary [blocks, block_tokens, rotary] hold each token's normalised latent and rotated key, which all
    heads share; they may be views of one cache. Scores are scaling * (q . [latent, rotary]); values are the latents.
    scales [blocks, block_tokens]: what one unit of each stored (fp8) latent is worth; the rotary key has no scale.
    split_tokens has no effect here: it only says how the kernel arranges its sums. Computes in float32. Raises
    ValueError for shapes that do not fit.
    """
    check_arguments(query, latents, rotary, batch, scales, split_tokens)
    width, block_tokens = latents.shape[2], latents.shape[1]
    output = torch.zeros(*query.shape[:2], width, dtype=query.dtype, device=query.device)
    starts = batch.query_starts.tolist()
    for request, context in enumerate(batch.context_lengths.tolist()):
        own = slice(starts[request], starts[request + 1])
        blocks = batch.block_tables[request, : -(-context // block_tokens)].long()
        seen = _gather(latents, blocks)[:context]
        if scales is not None:
            seen = seen * scales[blocks].flatten()[:context, None].float()
        keys = torch.cat([seen, _gather(rotary, blocks)[:context]], dim=-1)
        scores = torch.einsum("rhw,cw->hrc", query[own].float(), keys) * scaling
        at = torch.arange(context, device=query.device)
        hidden = at > at[context - (own.stop - own.start) :, None]
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
        output[own] = torch.einsum("hrc,cw->rhw", weights, seen).to(query.dtype)
    return output


def _gather(cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, width] of whole blocks."""
    # fp8 tensors can be indexed as bytes only
    stored = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
    return stored[blocks].view(cache.dtype).flatten(0, 1).float()


def check_arguments(
    query: torch.Tensor,
    latents: torch.Tensor,
    rotary: torch.Tensor,
    batch: PagedBatch,
    scales: torch.Tensor | None,
    split_tokens: int | None,
) -> None:
    """Raises ValueError naming the argument that does not fit the others. Looks at shapes only, never at contents."""
    if latents.dim() != 3 or rotary.shape[:-1] != latents.shape[:2]:
        raise ValueError(
            f"latents {tuple(latents.shape)} and rotary {tuple(rotary.shape)} must be [blocks, block_tokens, latent] "
            "and [blocks, block_tokens, rotary]"
        )
    if query.dim() != 3 or query.shape[2] != latents.shape[2] + rotary.shape[2]:
        raise ValueError(
            f"query {tuple(query.shape)} must be [tokens, heads, latent + rotary], "
            f"the last being {latents.shape[2]} + {rotary.shape[2]}"
        )
    if batch.query_starts.shape[0] != batch.requests + 1 or batch.block_tables.shape[0] != batch.requests:
        raise ValueError(
            f"query_starts {tuple(batch.query_starts.shape)} and block_tables {tuple(batch.block_tables.shape)} "
            f"do not describe {batch.requests} requests: want [requests + 1] and [requests, max_blocks]"
        )
    if scales is not None and (scales.shape != latents.shape[:2] or not scales.is_contiguous()):
        raise ValueError(f"scales {tuple(scales.shape)} must be {tuple(latents.shape[:2])}, contiguous")
    if split_tokens is not None and split_tokens <= 0:
        raise ValueError(f"split_tokens is {split_tokens}: want a positive number, or None to leave it out")
