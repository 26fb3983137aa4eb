"""One rank's weights: reads from a checkpoint exactly the slices that the rank holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from modeling.errors import CheckpointError
from modeling.families import ShardMap
from modeling.layout import text_layout
from modeling.reader import CheckpointReader
from modeling.shards import Shard
from modeling.target_config import TargetConfig

GATE_UP = ".mlp.experts.gate_up_proj"
DOWN = ".mlp.experts.down_proj"


class RankWeights:
    """Hands out tensors by their name in transformers' text model, cut to this rank, in the compute dtype.

    `bytes` counts what was handed out; `progress(tensors, bytes)` is called after every tensor.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: TargetConfig,
        shards: ShardMap,
        *,
        rank: int,
        size: int,
        dtype: torch.dtype,
        device: str | torch.device,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.reader, self.config, self.shards = reader, config, shards
        self.rank, self.size, self.dtype, self.device = rank, size, dtype, device
        self.layout = text_layout(reader)
        if self.layout.head is None and not config.tied:
            raise CheckpointError(
                f"checkpoint {reader.directory} has no lm_head.weight although config.json does not tie it to the "
                "embedding: download the missing file, or set tie_word_embeddings if it is tied"
            )
        self.bytes = 0
        self.tensors = 0
        self._progress = progress

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """This rank's part of a tensor. shape: what the whole must measure. Raises CheckpointError if it does not.

        dtype: of a tensor that needs another than the compute dtype.
        """
        stored = self._stored_name(name)
        if stored not in self.reader and name.endswith((GATE_UP, DOWN)):
            return self._done(self._fuse_experts(name, shape[0]))
        actual = self.reader.shape(stored)
        if actual != tuple(shape):
            raise CheckpointError(
                f"{stored} in {self.reader.directory} has shape {actual}, config.json implies {tuple(shape)}: "
                "the configuration belongs to another checkpoint"
            )
        return self._done(self._read(stored, self.shards.of(name), dtype).to(self.device))

    def _done(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors += 1
        self.bytes += tensor.nbytes
        if self._progress is not None:
            self._progress(self.tensors, self.bytes)
        return tensor

    def _stored_name(self, name: str) -> str:
        if name == "lm_head.weight":
            return self.layout.head or self.layout.embedding
        return self.layout.body + name

    def _read(self, stored: str, shard: Shard, dtype: torch.dtype | None = None) -> torch.Tensor:
        try:
            pieces = shard.slices(self.reader.shape(stored), self.rank, self.size)
        except CheckpointError as error:
            raise CheckpointError(f"{stored} in {self.reader.directory}: {error}") from error
        tensors = [self.reader.read(stored, piece, dtype or self.dtype) for piece in pieces]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=shard.dim or 0)

    def _fuse_experts(self, name: str, count: int) -> torch.Tensor:
        """Experts stored one by one, fused as transformers keeps them: [experts, ...]; one in flight at a time."""
        parts = ("gate_proj", "up_proj") if name.endswith(GATE_UP) else ("down_proj",)
        prefix = self._stored_name(name).rsplit(".", 1)[0]
        whole = self.shards.of(name)
        if whole.dim is None:
            raise CheckpointError(f"{name}: this family does not say how its experts are divided")
        one = Shard(whole.dim - 1, whole.sections[:1])  # of a single matrix: no expert dimension, one section
        fused: torch.Tensor | None = None
        for expert in range(count):
            matrices = [self._read(f"{prefix}.{expert}.{part}.weight", one) for part in parts]
            matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
            if fused is None:
                fused = torch.empty((count, *matrix.shape), dtype=self.dtype, device=self.device)
            fused[expert].copy_(matrix)
        assert fused is not None, f"{name}: no experts"
        return fused
