"""Which part of a tensor a tensor-parallel rank holds. Plain arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from modeling.errors import CheckpointError


@dataclass(frozen=True)
class Section:
    """A run of `units` equal parts (heads, or single channels), each `width` entries of the sharded dimension.

    shared: fewer units than ranks is fine; then each unit is held by several ranks (KV heads under wide TP).
    uneven: the last rank may hold less (vocabulary).
    """

    units: int
    width: int = 1
    shared: bool = False
    uneven: bool = False

    def part(self, rank: int, size: int) -> tuple[int, int]:
        """(start, stop) of the rank's entries within the section. Raises CheckpointError if ranks do not divide it."""
        if self.uneven:
            share = -(-self.units // size)
            return min(rank * share, self.units) * self.width, min((rank + 1) * share, self.units) * self.width
        if self.units % size == 0:
            share = self.units // size
            return rank * share * self.width, (rank + 1) * share * self.width
        if self.shared and size % self.units == 0:
            unit = rank * self.units // size
            return unit * self.width, (unit + 1) * self.width
        raise CheckpointError(f"{self.units} units of width {self.width} cannot be divided among {size} ranks")


@dataclass(frozen=True)
class Shard:
    """How one tensor is divided: along `dim`, section by section (fused tensors have several); dim None = not."""

    dim: int | None = None
    sections: tuple[Section, ...] = ()

    def slices(self, shape: tuple[int, ...], rank: int, size: int) -> list[tuple[slice, ...]]:
        """What the rank reads, to be concatenated along `dim`; one whole slice if the tensor is replicated.

        Raises CheckpointError if the sections do not add up to the tensor's size along `dim`.
        """
        if self.dim is None:
            return [tuple(slice(None) for _ in shape)]
        total = sum(section.units * section.width for section in self.sections)
        if len(shape) <= self.dim or shape[self.dim] != total:
            raise CheckpointError(f"has shape {shape}, but config.json implies {total} along dimension {self.dim}")
        pieces, base = [], 0
        for section in self.sections:
            start, stop = section.part(rank, size)
            pieces.append((*(slice(None),) * self.dim, slice(base + start, base + stop)))
            base += section.units * section.width
        return pieces

    def part_shape(self, shape: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
        """Shape of what the rank holds. Raises as `slices` does."""
        if self.dim is None:
            return shape
        held = sum(piece[self.dim].stop - piece[self.dim].start for piece in self.slices(shape, rank, size))
        return (*shape[: self.dim], held, *shape[self.dim + 1 :])


REPLICATED = Shard()
