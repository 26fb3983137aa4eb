"""Elementwise functions whose every entry goes through the same vector loop.

torch ends an array that does not fill its vectors, or whose entries do not lie side by side, with another algorithm
(for sigmoid, SiLU and softplus, though not for exp or a product), and divides long arrays among threads anywhere. The
last bit of an entry then depends on where it stands, hence on the batch and on how wide a rank's part is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.gates import Gate

VECTORS = 64  # entries: a multiple of what a vector loop takes at once, in every dtype and on every CPU
PIECE = 1 << 14  # entries of one call: torch does not divide so few among threads


class FullVectors(nn.Module):
    """A function of one tensor, entry by entry, that may not change its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        flat = _filled(x.reshape(1, -1))
        made = _joined([self.function(piece) for piece in flat.split(PIECE, dim=1)], x.numel())
        return made.view(x.shape)


class FullVectorGate(nn.Module):
    """A Gate. Halves of its input are laid out one after the other, for between them lies what others compute."""

    def __init__(self, gate: Gate):
        super().__init__()
        self.gate = gate

    def forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2 x width], all gates first -> [..., width]."""
        width = gate_up.shape[-1] // 2
        halves = _filled(gate_up.reshape(-1, 2, width).transpose(0, 1).reshape(2, -1))
        made = [self.gate(piece.reshape(1, -1)) for piece in halves.split(PIECE, dim=1)]
        return _joined(made, gate_up.numel() // 2).view(*gate_up.shape[:-1], width)


def _filled(x: Tensor) -> Tensor:
    """x [n, entries], the entries side by side and as many as fill vectors."""
    missing = -x.shape[1] % VECTORS
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def _joined(pieces: Sequence[Tensor], entries: int) -> Tensor:
    return (pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=1))[0, :entries]
