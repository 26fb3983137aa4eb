"""Reads tensors, or slices of them, from a checkpoint directory of safetensors files, sharded or single."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modeling.errors import CheckpointError

INDEX = "model.safetensors.index.json"
NUMBERS = ("F64", "F32", "F16", "BF16")  # safetensors' words for dtypes whose entries mean themselves


class CheckpointReader:
    """Random access to the tensors of one checkpoint. Files are memory-mapped: a slice costs its own bytes only.

    Raises CheckpointError if the directory, a shard or the index is missing or not readable.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._file_of = _index(self.directory)  # tensor name -> file
        self._open: dict[Path, Any] = {}
        self._read: set[str] = set()

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk, read from the file's header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Safetensors' word for the dtype on disk: "F32", "BF16", "F8_E4M3", "U8", ..."""
        return str(self._slice(name).get_dtype())

    @property
    def tensors_read(self) -> int:
        """Of how many tensors something was read."""
        return len(self._read)

    def unread(self) -> list[str]:
        """Names of which nothing was read yet, sorted."""
        return sorted(self._file_of.keys() - self._read)

    def read(
        self, name: str, slices: tuple[slice, ...] | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The tensor, or the part that `slices` selects (leading dimensions; missing ones are whole), on the CPU.

        dtype: converted to it; None keeps the one on disk. The result owns its memory: the file may go. Nothing else
        of the tensor is copied: a slice is one of the mapped file until then.
        Raises CheckpointError for an unknown name, a shard that lacks the tensor, and codes to be converted to numbers.
        """
        view = self._slice(name)
        if dtype is not None and view.get_dtype() not in NUMBERS:
            raise CheckpointError(
                f"{name} in {self._file_of[name]} is packed ({view.get_dtype()}), and quantization_config in "
                "config.json does not say how: take the checkpoint's own config.json"
            )
        self._read.add(name)
        shape = tuple(view.get_shape())
        if slices is not None and len(slices) > len(shape):
            raise CheckpointError(f"{name} in {self._file_of[name]} has shape {shape}: {len(slices)} slices do not fit")
        tensor = view[_bounded(slices, shape)] if shape else view[...]
        return tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Unmap every file. Tensors already read stay valid."""
        self._open.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slice(self, name: str) -> Any:
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(
                f"checkpoint {self.directory} has no tensor {name!r} ({len(self._file_of)} others): "
                "is it the checkpoint of another model?"
            )
        try:
            return self._mapped(file).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} lacks tensor {name!r} that {INDEX} places there ({error}): download that file again"
            ) from error

    def _mapped(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = _open(file)
        return self._open[file]


def _bounded(slices: tuple[slice, ...] | None, shape: Sequence[int]) -> tuple[slice, ...]:
    parts = list(slices or ())
    parts += [slice(None)] * (len(shape) - len(parts))
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(parts, shape))


def _index(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint directory {directory} does not exist: give the path of a local checkpoint")
    index = directory / INDEX
    if index.exists():
        return _sharded(directory, index)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"checkpoint {directory} holds no *.safetensors file: convert its weights with "
            "save_pretrained(..., safe_serialization=True)"
        )
    return {name: file for file in files for name in _open(file).keys()}  # noqa: SIM118 - not a dict


def _sharded(directory: Path, index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no safetensors index ({error!r}): download it again") from error
    missing = sorted({file for file in weight_map.values() if not (directory / file).exists()})
    if missing:
        raise CheckpointError(
            f"checkpoint {directory} lacks {len(missing)} of the files that {INDEX} names "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): download them"
        )
    return {name: directory / file for name, file in weight_map.items()}


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}): download it again") from error
