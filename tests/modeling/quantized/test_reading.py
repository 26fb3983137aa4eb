"""Packed matrices mean what their formats say, in whole and in any part that a rank may hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from modeling.errors import CheckpointError
from modeling.quantized.packed import BlockPacked, StackedRows, stack_of, stacked_rows
from modeling.quantized.reading import PackedReader
from modeling.quantized.scheme import MXFP4, Format, QuantScheme, fp8, int4, nvfp4
from modeling.reader import CheckpointReader
from tests.modeling.quantized import packing

ROWS, COLUMNS = 48, 96
KINDS: dict[str, tuple[Format, Callable[[torch.Tensor], packing.Stored]]] = {
    "fp8": (fp8((16, 32), ".weight_scale_inv"), lambda weight: packing.fp8(weight, (16, 32))),
    "fp8, cut blocks": (fp8((20, 36), ".weight_scale_inv"), lambda weight: packing.fp8(weight, (20, 36))),
    "fp8, one block": (fp8((128, 128), ".weight_scale_inv"), packing.fp8),
    "mxfp4": (MXFP4, packing.mxfp4),
    "int4": (int4(32), packing.int4),
    "nvfp4": (nvfp4(16, modelopt=False), lambda weight: packing.nvfp4(weight, modelopt=False)),
    "nvfp4 of modelopt": (nvfp4(16, modelopt=True), lambda weight: packing.nvfp4(weight, modelopt=True)),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Of every kind a checkpoint with one matrix `m`, and what it stands for."""
    torch.set_num_threads(1)
    made = {}
    for kind, (_, pack) in KINDS.items():
        directory = tmp_path_factory.mktemp("packed")
        tensors, dense = pack(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))
        save_file({f"m{end}": tensor for end, tensor in tensors.items()}, directory / "model.safetensors")
        made[kind] = directory, dense
    return made


def read(directory: Path, kind: Format, part: tuple[slice, ...] | None = None) -> BlockPacked:
    with CheckpointReader(directory) as reader:
        packed = PackedReader(reader, QuantScheme((kind,)))
        assert packed.format_of("m", "m") == kind
        return packed.read("m", kind, (ROWS, COLUMNS), part)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_matrix_is_what_its_format_says(kind, stored):
    directory, dense = stored[kind]
    packed = read(directory, KINDS[kind][0])
    torch.testing.assert_close(packed.dequantize(torch.float32), dense, rtol=1e-6, atol=0)
    assert packed.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert packed.shape == (ROWS, COLUMNS)
    assert packed.nbytes <= ROWS * COLUMNS * 1.3


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.tuples(st.integers(0, ROWS - 1), st.integers(1, ROWS)),
    columns=st.tuples(st.integers(0, COLUMNS // 2 - 1), st.integers(1, COLUMNS // 2)),
)
def test_any_part_is_that_part_of_the_whole(kind, rows, columns, stored):
    top, bottom = rows[0], max(rows[1], rows[0] + 1)
    left, right = 2 * columns[0], 2 * max(columns[1], columns[0] + 1)
    directory, dense = stored[kind]
    part = (slice(top, bottom), slice(left, right))
    packed = read(directory, KINDS[kind][0], part)
    torch.testing.assert_close(packed.dequantize(torch.float32), dense[part], rtol=1e-6, atol=0)
    assert packed.codes.numel() * (1 if packed.values is None else 2) == (bottom - top) * (right - left)


def test_a_part_that_splits_a_byte_is_refused(stored):
    with pytest.raises(CheckpointError, match=r"columns 0\.\.33 of a rank split one; choose a smaller"):
        read(stored["mxfp4"][0], MXFP4, (slice(None), slice(0, 33)))


def test_transformers_dequantizes_the_same_fp8(stored):
    tensors, _ = KINDS["fp8"][1](torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))
    theirs = Fp8Dequantize(None)._dequantize_one(tensors[".weight"], tensors[".weight_scale_inv"], torch.float32)
    assert torch.equal(read(stored["fp8"][0], KINDS["fp8"][0]).dequantize(torch.float32), theirs)


def test_transformers_dequantizes_the_same_mxfp4(stored):
    tensors, _ = packing.mxfp4(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))
    theirs = convert_moe_packed_tensors(tensors["_blocks"][None], tensors["_scales"][None], dtype=torch.float32)
    assert torch.equal(read(stored["mxfp4"][0], MXFP4).dequantize(torch.float32), theirs[0].t())


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.rand(ROWS, 1), torch.rand(ROWS)])
def test_one_fp8_scale_for_all_or_for_a_row_is_read_too(scale, tmp_path):
    codes = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    save_file({"m.weight": codes, "m.weight_scale": scale}, tmp_path / "model.safetensors")
    kind = fp8((0, 0) if scale.numel() == 1 else (1, 0), ".weight_scale")
    got = read(tmp_path, kind, (slice(8, 40),)).dequantize(torch.float32)
    want = codes.float() * (scale if scale.numel() == 1 else scale.view(-1, 1))
    torch.testing.assert_close(got, want[8:40], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_holds_every_matrix_and_shares_its_memory(kind, stored):
    one = read(stored[kind][0], KINDS[kind][0])
    other = read(stored[kind][0], KINDS[kind][0])
    other.codes.view(torch.uint8).bitwise_xor_(0x80)
    stack = stack_of(2, lambda index: (one, other)[index], "cpu")
    assert (len(stack), stack.shape) == (2, (2, ROWS, COLUMNS))
    assert torch.equal(stack[1].dequantize(torch.float32), other.dequantize(torch.float32))
    assert torch.equal(stack.dequantize(torch.float32)[0], one.dequantize(torch.float32))
    assert stack[1].codes.untyped_storage().data_ptr() == stack.codes.untyped_storage().data_ptr()
    assert stack.nbytes == one.nbytes + other.nbytes


def test_rows_of_packed_and_plain_weights_go_one_below_the_other(stored):
    directory, dense = stored["fp8"]
    plain = torch.randn(5, COLUMNS)
    both = stacked_rows([read(directory, KINDS["fp8"][0]), plain])
    assert isinstance(both, StackedRows)
    assert torch.equal(both.dequantize(torch.float32), torch.cat([dense, plain]))
    assert both.shape == (ROWS + 5, COLUMNS)
    assert isinstance(stacked_rows([plain, plain]), torch.Tensor)


def test_every_other_row_is_picked(stored):
    directory, dense = stored["mxfp4"]
    picked = read(directory, MXFP4).every(1, 2)
    assert torch.equal(picked.dequantize(torch.float32), dense[1::2])


def test_codes_without_scales_are_named(tmp_path):
    save_file({"m.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has m\.weight \(FP8\) but not m\.weight_scale_inv: download"):
        read(tmp_path, fp8((2, 2), ".weight_scale_inv"))


@pytest.mark.parametrize(
    ("end", "wrong"),
    [(".weight_packed", (ROWS, 4)), (".weight_scale", (ROWS, 5)), (".weight_shape", (2,))],
)
def test_a_misshapen_tensor_is_named(end, wrong, tmp_path):
    tensors, _ = packing.int4(torch.randn(ROWS, COLUMNS))
    tensors[end] = torch.zeros(wrong, dtype=tensors[end].dtype)
    save_file({f"m{end}": tensor for end, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"m\{end} in .* has shape"):
        read(tmp_path, int4(32))


def test_a_packed_module_that_the_configuration_calls_unpacked_is_refused(stored):
    with CheckpointReader(stored["int4"][0]) as reader:
        packed = PackedReader(reader, QuantScheme((int4(32),), ("re:.*m",)))
        with pytest.raises(CheckpointError, match=r"m\.weight_packed .* lists its module as not converted"):
            packed.format_of("m", "m")
