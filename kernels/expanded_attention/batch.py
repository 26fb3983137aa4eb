"""What is attended to, section by section, and what the reference and the kernel check before they begin."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChunkBatch:
    """Query rows of several chunks, one after the other, and their contexts laid side by side.

    query_starts: int32 [chunks + 1], ascending from 0: chunk c owns the rows from query_starts[c] on.
    context_starts: int32 [chunks + 1], ascending from 0: its context, its own tokens included, takes the places from
        context_starts[c] to before context_starts[c + 1]. Its rows are the last of them; a row sees the places of its
        context up to its own.
    """

    query_starts: torch.Tensor
    context_starts: torch.Tensor

    @property
    def chunks(self) -> int:
        return self.query_starts.shape[0] - 1


@dataclass(frozen=True)
class Sums:
    """What rows have seen of the sections so far, float32. peak, mass [rows, heads]: the highest score in units of
    log 2, and the sum of weights 2 ** (score - peak); part [rows, heads, value]: the values' weighted sum. Undefined
    for rows of which no section has been seen.
    """

    part: torch.Tensor
    peak: torch.Tensor
    mass: torch.Tensor


def empty_sums(rows: int, heads: int, value: int, device: torch.device) -> Sums:
    part = torch.empty(rows, heads, value, dtype=torch.float32, device=device)
    peak, mass = torch.empty(2, rows, heads, dtype=torch.float32, device=device).unbind()
    return Sums(part, peak, mass)


def check_copy(
    latents: torch.Tensor,
    rotary: torch.Tensor,
    block_tables: torch.Tensor,
    context_starts: torch.Tensor,
    scales: torch.Tensor | None,
    output: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Raises ValueError naming the argument that does not fit the others. Looks at shapes only, never at contents."""
    if latents.dim() != 3 or rotary.shape[:-1] != latents.shape[:2]:
        raise ValueError(
            f"latents {tuple(latents.shape)} and rotary {tuple(rotary.shape)} must be [blocks, block_tokens, latent] "
            "and [blocks, block_tokens, rotary]"
        )
    if block_tables.shape[0] != context_starts.shape[0] - 1:
        raise ValueError(
            f"block_tables {tuple(block_tables.shape)} and context_starts {tuple(context_starts.shape)} must be "
            "[chunks, max_blocks] and [chunks + 1]"
        )
    if scales is not None and (scales.shape != latents.shape[:2] or not scales.is_contiguous()):
        raise ValueError(f"scales {tuple(scales.shape)} must be {tuple(latents.shape[:2])}, contiguous")
    for name, own, cache in zip(("latents", "rotary"), output, (latents, rotary)):
        if own.shape != (output[0].shape[0], cache.shape[2]) or not own.is_contiguous():
            raise ValueError(f"output {name} {tuple(own.shape)} must be [section, {cache.shape[2]}], contiguous")


def check_attend(
    content: torch.Tensor,
    rotary: torch.Tensor,
    expanded: torch.Tensor,
    keys: torch.Tensor,
    batch: ChunkBatch,
    output: torch.Tensor,
    sums: Sums | None,
) -> None:
    """Raises ValueError as check_copy does."""
    rows, heads, width = content.shape
    value = expanded.shape[2] - width
    if rotary.shape[:2] != (rows, heads) or keys.shape != (expanded.shape[0], rotary.shape[2]):
        raise ValueError(
            f"rotary {tuple(rotary.shape)} and keys {tuple(keys.shape)} must be [{rows}, {heads}, rotary] and "
            f"[{expanded.shape[0]}, rotary]"
        )
    if expanded.dim() != 3 or expanded.shape[1] != heads or value <= 0 or not expanded.is_contiguous():
        raise ValueError(
            f"expanded {tuple(expanded.shape)} must be [section, {heads}, {width} + value], contiguous, for content "
            f"{tuple(content.shape)}"
        )
    if batch.context_starts.shape != batch.query_starts.shape:
        raise ValueError(
            f"query_starts {tuple(batch.query_starts.shape)} and context_starts {tuple(batch.context_starts.shape)} "
            "must both be [chunks + 1]"
        )
    if output.shape != (rows, heads, value) or not output.is_contiguous():
        raise ValueError(f"output {tuple(output.shape)} must be [{rows}, {heads}, {value}], contiguous")
    if sums is not None and (sums.part.shape != output.shape or sums.peak.shape != (rows, heads)):
        raise ValueError(f"sums of {tuple(sums.part.shape)} must be of the output's {tuple(output.shape)}")
