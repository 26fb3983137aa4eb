"""Recurrent states of the Gated DeltaNet layers, per slot, and the commit of a verified block.

A verify leaves the committed state untouched and keeps what a replay needs; the commit of its accepted prefix is one
weighted sum over the block, because what a token writes (its corrected value) does not depend on later tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verified:
    """What one layer keeps of a verify of R rows x Q tokens until its outcome is known.

    mixed [R, window + Q, channels]: convolution inputs, the committed ones first; keys [R, heads, Q, key_dim];
    decay [R, heads, Q]: running sum of log decays; corrected [R, heads, Q, value_dim].
    """

    mixed: torch.Tensor
    keys: torch.Tensor
    decay: torch.Tensor
    corrected: torch.Tensor


class RecurrentStates:
    """conv [layers, slots, window, channels] and memory [layers, slots, heads, key_dim, value_dim] (float32).

    window: the convolution's width - 1.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        *,
        window: int,
        channels: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: str | torch.device,
    ):
        self.conv = torch.zeros(layers, slots, window, channels, dtype=dtype, device=device)
        self.memory = torch.zeros(layers, slots, heads, key_dim, value_dim, device=device)
        self._verified: dict[int, Verified] = {}
        self._slots: tuple[int, ...] = ()

    def begin_verify(self, slots: Sequence[int]) -> None:
        """The rows of the verify that the layers are about to keep."""
        self._verified.clear()
        self._slots = tuple(slots)

    def keep(self, layer: int, verified: Verified) -> None:
        self._verified[layer] = verified

    def commit(self, kept: Mapping[int, int]) -> None:
        """Advance the rows of the last verify by kept[slot] tokens each; rows without an entry stay where they were."""
        rows = [row for row, slot in enumerate(self._slots) if slot in kept]
        if not self._verified or not rows:
            return
        slots = [self._slots[row] for row in rows]
        self._advance(
            torch.tensor(slots, device=self.conv.device),
            torch.tensor([kept[slot] for slot in slots], device=self.conv.device),
            None if len(rows) == len(self._slots) else torch.tensor(rows, device=self.conv.device),
        )
        self._verified.clear()
        self._slots = ()

    def _advance(self, slots: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor | None) -> None:
        layers = [self._verified[layer] for layer in range(self.conv.shape[0])]
        mixed = _stack([layer.mixed for layer in layers], rows)  # [layers, R, window + Q, channels]
        keys = _stack([layer.keys for layer in layers], rows)
        decay = _stack([layer.decay for layer in layers], rows)  # [layers, R, heads, Q]
        corrected = _stack([layer.corrected for layer in layers], rows)
        count = decay.shape[-1]

        last = (kept - 1).view(1, -1, 1, 1).expand(*decay.shape[:3], 1)
        total = decay.gather(-1, last)  # [layers, R, heads, 1]
        beyond = torch.arange(count, device=kept.device) >= kept[:, None]  # [R, Q]
        weight = (total - decay).masked_fill_(beyond[None, :, None], float("-inf")).exp_()
        written = (keys * weight[..., None]).transpose(-1, -2) @ corrected
        self.memory[:, slots] = self.memory[:, slots].mul_(total.exp()[..., None]).add_(written)

        window = self.conv.shape[2]
        at = kept[:, None] + torch.arange(window, device=kept.device)  # [R, window]
        self.conv[:, slots] = mixed[:, torch.arange(len(kept), device=kept.device)[:, None], at]


def _stack(tensors: list[torch.Tensor], rows: torch.Tensor | None) -> torch.Tensor:
    stacked = torch.stack(tensors)
    return stacked if rows is None else stacked[:, rows]
