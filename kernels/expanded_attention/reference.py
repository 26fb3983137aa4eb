"""Latent attention in expanded form in plain torch, chunk by chunk (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

import math

import torch

from kernels.expanded_attention.batch import ChunkBatch, Sums, check_attend, check_copy

LOG2_E = 1 / math.log(2)


def copy_section(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    block_tables: torch.Tensor,
    context_starts: torch.Tensor,
    output: tuple[torch.Tensor, torch.Tensor],
    *,
    first: int,
    scales: torch.Tensor | None = None,
) -> None:
    """What a paged cache holds for the places from `first` on goes into output [section, latent] and [section, rotary].

    latents [blocks, block_tokens, latent], rotary [blocks, block_tokens, rotary], scales: as in latent_attention.
    block_tables int32 [chunks, max_blocks] and context_starts: of a ChunkBatch, which has all those places. Raises
    ValueError for shapes that do not fit.
    """
    check_copy(latents, rotary, block_tables, context_starts, scales, output)
    bounds, size = context_starts.tolist(), latents.shape[1]
    for into, place in enumerate(range(first, first + len(output[0]))):
        chunk = max(index for index, start in enumerate(bounds[:-1]) if start <= place)
        block, within = divmod(place - bounds[chunk], size)
        stored = int(block_tables[chunk, block]), within
        own = latents[stored[0]][within].float()
        output[0][into] = own if scales is None else own * scales[stored].float()
        output[1][into] = rotary[stored[0]][within]


def attend_section(
    content: torch.Tensor,
    rotary: torch.Tensor,
    expanded: torch.Tensor,
    keys: torch.Tensor,
    batch: ChunkBatch,
    output: torch.Tensor,
    sums: Sums | None,
    *,
    first: int,
    scaling: float,
) -> None:
    """Add the section of the places first, first + 1, ... to what the rows have seen; write `output` of those that have
    seen all of theirs.

    content [rows, heads, content] and rotary [rows, heads, rotary]: the two parts of queries. expanded [section, heads,
    content + value]: each head's keys and values, without what all heads share of the keys, which is keys [section,
    rotary]. output [rows, heads, value]. sums: carried from one section to the next, in order from place 0; None if
    this section is all. Computes in float32. Raises ValueError for shapes that do not fit.
    """
    check_attend(content, rotary, expanded, keys, batch, output, sums)
    width, stop = content.shape[2], first + len(expanded)
    starts, bounds = batch.query_starts.tolist(), batch.context_starts.tolist()
    for chunk in range(batch.chunks):
        for row in range(starts[chunk], starts[chunk + 1]):
            place = bounds[chunk + 1] - starts[chunk + 1] + row
            low, high = max(first, bounds[chunk]), min(stop, place + 1)
            if low >= high:
                continue
            seen, shared = expanded[low - first : high - first].float(), keys[low - first : high - first].float()
            scores = torch.einsum("hw,chw->hc", content[row].float(), seen[..., :width])
            scores = (scores + rotary[row].float() @ shared.T) * (scaling * LOG2_E)
            peak = scores.amax(-1)
            if low > bounds[chunk]:
                assert sums is not None
                peak = torch.maximum(peak, sums.peak[row])
            weights = torch.exp2(scores - peak[:, None])
            mass, part = weights.sum(-1), torch.einsum("hc,chv->hv", weights, seen[..., width:])
            if low > bounds[chunk]:
                assert sums is not None
                keep = torch.exp2(sums.peak[row] - peak)
                mass, part = mass + keep * sums.mass[row], part + keep[:, None] * sums.part[row]
            if high == place + 1:
                output[row] = (part / mass[:, None]).to(output.dtype)
            else:
                assert sums is not None
                sums.part[row], sums.peak[row], sums.mass[row] = part, peak, mass
