"""One rank's weights: reads from a checkpoint exactly the slices that the rank holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from modeling.errors import CheckpointError
from modeling.families import ShardMap
from modeling.layout import text_layout
from modeling.quantized.packed import BlockPacked, Weight, dense, stack_of, stacked_rows
from modeling.quantized.reading import PackedReader
from modeling.quantized.scheme import Format, scheme_of
from modeling.reader import CheckpointReader
from modeling.shards import Shard
from modeling.target_config import TargetConfig

GATE_UP = ".mlp.experts.gate_up_proj"
DOWN = ".mlp.experts.down_proj"
_W = TypeVar("_W", torch.Tensor, Weight)


@dataclass(frozen=True)
class LoadProgress:
    """tensors: of the checkpoint that were read so far, in whole or in part, out of `total`. bytes: this rank's."""

    tensors: int
    total: int
    bytes: int


class RankWeights:
    """Hands out tensors by their name in transformers' text model, cut to this rank.

    take() gives plain tensors in the compute dtype, take_matrix() leaves packed what is packed. `bytes` counts what was
    handed out; `progress` is told after every tensor. finish() must be called when all was taken.
    Raises CheckpointError if the checkpoint is packed in a way that is not supported, or lacks its head.
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
        progress: Callable[[LoadProgress], None] | None = None,
    ):
        self.reader, self.config, self.shards = reader, config, shards
        self.rank, self.size, self.dtype, self.device = rank, size, dtype, device
        self.packed = PackedReader(reader, scheme_of(config))
        self.layout = text_layout(reader)
        if self.layout.head is None and not config.tied:
            raise CheckpointError(
                f"checkpoint {reader.directory} has no lm_head.weight although config.json does not tie it to the "
                "embedding: download the missing file, or set tie_word_embeddings if it is tied"
            )
        self.bytes = 0
        self._total = len(self._unread())
        self._progress = progress

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """This rank's part of a tensor, dequantized if it is packed.

        shape: what the whole must measure. dtype: of a tensor that needs another than the compute dtype.
        Raises CheckpointError if it is missing or misshapen.
        """
        return self._done(dense(self._read(name, shape, dtype or self.dtype), dtype or self.dtype))

    def take_matrix(self, name: str, shape: tuple[int, ...]) -> Weight:
        """As take(), but packed if it is packed in the checkpoint. Stacks of experts are fused if they are apart."""
        return self._done(self._read(name, shape, self.dtype))

    def take_transposed(self, name: str, shape: tuple[int, ...]) -> Weight:
        """take_matrix() of a stack that unpacked checkpoints store as [experts, in, out], packed ones the other way.

        shape: the former, of the whole. Returns [experts, out, in].
        """
        module = self._stored_name(name)
        packed = self.packed.format_of(module, name)
        if packed is None:
            return self._done(_transposed(dense(self._read(name, shape, self.dtype), self.dtype)))
        plain = self.shards.of(name)
        shard = plain if plain.dim is None else Shard(3 - plain.dim, plain.sections)
        return self._done(self._read_packed(module, packed, (shape[0], shape[2], shape[1]), shard))

    def finish(self) -> None:
        """Raises CheckpointError for tensors of the text model that nobody took."""
        extra = self._unread()
        if extra:
            raise CheckpointError(
                f"checkpoint {self.reader.directory} has {len(extra)} tensors that {self.config.model_type} has no use "
                f"for ({', '.join(extra[:3])}{', ...' if len(extra) > 3 else ''}): config.json or the weights belong "
                "to another checkpoint"
            )

    def _unread(self) -> list[str]:
        return [name for name in self.reader.unread() if not self.layout.is_aside(name, self.config.layers)]

    def _done(self, weight: _W) -> _W:
        self.bytes += weight.nbytes
        if self._progress is not None:
            self._progress(LoadProgress(self.reader.tensors_read, self._total, self.bytes))
        return weight

    def _stored_name(self, name: str) -> str:
        if name == "lm_head.weight":
            return self.layout.head or self.layout.embedding
        return self.layout.body + name

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
        stored, shard = self._stored_name(name), self.shards.of(name)
        packed = self.packed.format_of(stored.removesuffix(".weight"), name)
        if packed is not None:
            return self._read_packed(stored.removesuffix(".weight"), packed, shape, shard)
        if stored not in self.reader and name.endswith((GATE_UP, DOWN)):
            return self._fuse_experts(name, shape)
        return self._read_plain(stored, shape, shard, dtype).to(self.device)

    def _read_plain(self, stored: str, shape: tuple[int, ...], shard: Shard, dtype: torch.dtype) -> torch.Tensor:
        actual = self.reader.shape(stored)
        if actual != tuple(shape):
            raise CheckpointError(
                f"{stored} in {self.reader.directory} has shape {actual}, config.json implies {tuple(shape)}: "
                "the configuration belongs to another checkpoint"
            )
        tensors = [self.reader.read(stored, piece, dtype) for piece in self._pieces(stored, shape, shard)]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=shard.dim or 0)

    def _read_packed(self, module: str, packed: Format, shape: tuple[int, ...], shard: Shard) -> Weight:
        pieces = self._pieces(module, shape, shard)
        return stacked_rows([self.packed.read(module, packed, shape, piece).to(self.device) for piece in pieces])

    def _pieces(self, stored: str, shape: tuple[int, ...], shard: Shard) -> list[tuple[slice, ...]]:
        try:
            return shard.slices(tuple(shape), self.rank, self.size)
        except CheckpointError as error:
            raise CheckpointError(f"{stored} in {self.reader.directory}: {error}") from error

    def _fuse_experts(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Experts stored one by one, fused as transformers keeps them: [experts, ...]; one in flight at a time."""
        count, rows, columns = shape
        parts = ("gate_proj", "up_proj") if name.endswith(GATE_UP) else ("down_proj",)
        prefix = self._stored_name(name).rsplit(".", 1)[0]
        whole = self.shards.of(name)
        if whole.dim is None:
            raise CheckpointError(f"{name}: this family does not say how its experts are divided")
        one = Shard(whole.dim - 1, whole.sections[:1])  # of a single matrix: no expert dimension, one section
        single = (rows // len(parts), columns)
        packed = self.packed.format_of(f"{prefix}.0.{parts[0]}", name)
        if packed is not None:
            return stacked_rows(
                [
                    self._stack(name, count, partial(self._packed_expert, prefix, part, packed, single, one))
                    for part in parts
                ]
            )
        fused: torch.Tensor | None = None
        for expert in range(count):
            matrices = [self._read_plain(f"{prefix}.{expert}.{part}.weight", single, one, self.dtype) for part in parts]
            matrix = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
            if fused is None:
                fused = torch.empty((count, *matrix.shape), dtype=self.dtype, device=self.device)
            fused[expert].copy_(matrix)
        assert fused is not None, f"{name}: no experts"
        return fused

    def _packed_expert(
        self, prefix: str, part: str, packed: Format, shape: tuple[int, ...], shard: Shard, expert: int
    ) -> BlockPacked:
        module = f"{prefix}.{expert}.{part}"
        (piece,) = self._pieces(module, shape, shard)
        return self.packed.read(module, packed, shape, piece)

    def _stack(self, name: str, count: int, read: Callable[[int], BlockPacked]) -> BlockPacked:
        try:
            return stack_of(count, read, self.device)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(
                f"experts of {name} in {self.reader.directory}: {error}; download the checkpoint again"
            ) from error


def _transposed(matrices: torch.Tensor) -> torch.Tensor:
    """[experts, in, out] -> [experts, out, in] in the same memory: only one expert is ever there twice."""
    turned = matrices.view(len(matrices), matrices.shape[2], matrices.shape[1])
    for before, after in zip(matrices, turned):
        after.copy_(before.t().clone(memory_format=torch.contiguous_format))
    return turned
