"""Slices of sharded checkpoints, and what a reader says about broken ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from modeling.errors import CheckpointError
from modeling.reader import INDEX, CheckpointReader

A = torch.arange(48, dtype=torch.float32).view(6, 8)
B = torch.arange(5, dtype=torch.bfloat16)


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": A}, tmp_path / "model-1.safetensors")
    save_file({"b": B}, tmp_path / "model-2.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    return tmp_path


def test_names_and_shapes_span_the_shards(sharded):
    reader = CheckpointReader(sharded)
    assert reader.names() == ["a", "b"]
    assert reader.shape("a") == (6, 8)
    assert "b" in reader


@pytest.mark.parametrize(
    "slices", [(slice(2, 5),), (slice(None), slice(3, 4)), (slice(4, None), slice(0, 2)), (slice(0, 0),), None]
)
def test_a_slice_equals_the_slice_of_the_whole(sharded, slices):
    assert torch.equal(CheckpointReader(sharded).read("a", slices), A[slices or ...])


def test_a_slice_keeps_no_more_memory_than_its_own(sharded):
    part = CheckpointReader(sharded).read("a", (slice(None), slice(1, 3)))
    assert part.untyped_storage().nbytes() == part.numel() * 4
    assert part.is_contiguous()


def test_a_tensor_outlives_its_reader(sharded):
    with CheckpointReader(sharded) as reader:
        whole = reader.read("a")
    (sharded / "model-1.safetensors").unlink()
    assert torch.equal(whole, A)


def test_dtype_is_converted_on_request_only(sharded):
    reader = CheckpointReader(sharded)
    assert reader.read("b").dtype == torch.bfloat16
    assert reader.read("b", dtype=torch.float32).dtype == torch.float32


def test_a_single_file_needs_no_index(tmp_path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    assert torch.equal(CheckpointReader(tmp_path).read("a"), A)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist: give the path of a local checkpoint"):
        CheckpointReader(tmp_path / "nowhere")


def test_a_directory_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file"):
        CheckpointReader(tmp_path)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the files .*model-2\.safetensors"):
        CheckpointReader(sharded)


def test_a_missing_tensor_is_named(sharded):
    with pytest.raises(CheckpointError, match="no tensor 'c'"):
        CheckpointReader(sharded).read("c")


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors lacks tensor 'a'"):
        CheckpointReader(sharded).read("a")


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        CheckpointReader(tmp_path)


def test_a_damaged_index_is_named(sharded):
    (sharded / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="is no safetensors index"):
        CheckpointReader(sharded)
