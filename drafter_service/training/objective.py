"""The DFlash training objective (arXiv 2602.06036, section on training; D-PACE weights as an option).

Random anchors in a sequence; a block of one clean token and B-1 masks stands at each; it sees the context features
strictly before its anchor, and itself; row k predicts the token k places after the anchor, row 0 is not trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drafter_service.model import PADDING, DFlashModel, block_masks


@dataclass(frozen=True)
class Blocks:
    """Anchors of a batch of sequences. anchors [N, A] (distinct within a row); labels, valid [N, A, B-1]."""

    anchors: Tensor
    labels: Tensor
    valid: Tensor


def sample_blocks(
    ids: Tensor, lengths: Tensor, starts: Tensor, count: int, block_size: int, generator: torch.Generator
) -> Blocks:
    """`count` distinct anchors per row, uniform over starts-1 .. lengths-2. ids [N, T]; starts, lengths [N].

    Where a row has fewer places than `count`, the surplus anchors lie outside it and their labels are not valid.
    """
    rows, width = ids.shape
    places = torch.arange(width)
    allowed = (places >= starts[:, None] - 1) & (places <= lengths[:, None] - 2)
    chance = torch.rand(rows, width, generator=generator).masked_fill(~allowed, -1.0)
    anchors = chance.topk(min(count, width), dim=1).indices
    usable = allowed.gather(1, anchors)
    positions = anchors[:, :, None] + torch.arange(1, block_size)
    valid = (positions < lengths[:, None, None]) & usable[:, :, None]
    labels = ids.gather(1, positions.clamp(max=width - 1).flatten(1)).view_as(positions)
    return Blocks(anchors, labels, valid)


def block_hidden(
    model: DFlashModel,
    embedding: torch.nn.Module,
    taps: Tensor,
    ids: Tensor,
    lengths: Tensor,
    anchors: Tensor,
    size: int = 0,
) -> Tensor:
    """Hidden states of rows 1..B-1 of the block at every anchor: [N, A, B-1, hidden]. taps [N, T, taps x hidden].

    size: rows of a block, the bonus token's included; 0 = the checkpoint's block size.
    """
    size = size or model.dflash.block_size
    rows, width = ids.shape
    device = taps.device
    context_positions = torch.arange(width, device=device).expand(rows, -1)
    context_positions = context_positions.masked_fill(context_positions >= lengths.to(device)[:, None], PADDING)
    anchors = anchors.to(device)
    positions = (anchors[:, :, None] + torch.arange(size, device=device)).flatten(1)
    bases = anchors.repeat_interleave(size, dim=1)
    block_ids = torch.full((rows, anchors.shape[1], size), model.dflash.mask_token_id, device=device)
    block_ids[:, :, 0] = ids.to(device).gather(1, anchors)
    features = model.features(taps)
    context = model.context_kv(features, context_positions)
    masks = block_masks(model.dflash, positions, bases, context_positions)
    embedded = embedding(block_ids.flatten(1)).to(features.dtype)
    hidden = model(embedded, positions, context, masks, positions - bases)
    return hidden.unflatten(1, (-1, size))[:, :, 1:].contiguous()  # a strided head GEMM would copy the weight per block


def teacher_rows(final: Tensor, blocks: Blocks) -> Tensor:
    """The target's final states at the position before each label: [N, A, B-1, hidden]. final [N, T, hidden]."""
    rows = blocks.labels.shape[2]
    places = blocks.anchors[:, :, None] + torch.arange(rows)
    places = places.clamp(max=final.shape[1] - 1).flatten(1).to(final.device)
    picked = final.gather(1, places[:, :, None].expand(-1, -1, final.shape[2]))
    return picked.unflatten(1, (-1, rows)).contiguous()


def block_loss(
    logits: Tensor, blocks: Blocks, loss: str, gamma: float, alpha: float, teacher: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(mean weighted cross-entropy, mean accepted length tau with the bonus) of logits [N, A, B-1, vocabulary].

    loss "decay": weight exp(-(k-1)/gamma) for row k. "dpace": weight (product of the probabilities of the labels before
    row k, detached) ** alpha, so that a row counts as much as it is reached. teacher: the target's logits for the same
    rows; half of the loss is then the cross-entropy against its distribution, which says more than one token does.
    """
    labels, valid = blocks.labels.to(logits.device), blocks.valid.to(logits.device)
    scores = logits.float()
    normal = scores.logsumexp(-1)
    cross_entropy = normal - scores.gather(-1, labels[..., None])[..., 0]
    if loss == "decay":
        weight = torch.exp(-torch.arange(labels.shape[2], device=logits.device) / gamma).expand_as(cross_entropy)
    elif loss == "dpace":
        log_reached = F.pad(-cross_entropy.detach()[:, :, :-1].cumsum(2), (1, 0))
        weight = (alpha * log_reached).exp()
    else:
        raise ValueError(f"loss {loss!r} is unknown: use 'decay' or 'dpace'")
    weight = weight * valid
    if teacher is not None:
        against_teacher = normal - (teacher.float().softmax(-1) * scores).sum(-1)
        cross_entropy = 0.5 * (cross_entropy + against_teacher)
    mean = (weight * cross_entropy).sum() / weight.sum().clamp(min=1e-6)
    with torch.no_grad():
        right = (scores.argmax(-1) == labels) & valid
        accepted = right.int().cumprod(2).sum(2)[valid[:, :, 0]].float()
    return mean, 1 + accepted.mean() if accepted.numel() else torch.ones(())
