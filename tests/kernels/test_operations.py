"""A rank's layers over the kernels are those over torch's operations; if asked to, bit by bit whatever is beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from modeling.experts import ExpertWeights, make_experts
from modeling.fixed_linear import fixed_linear
from modeling.gates import ClampedGate, silu_gate
from modeling.kernel_linear import TritonLinear
from modeling.kernel_operations import DeterministicTritonOperations, TritonOperations
from modeling.kernel_weights import matrices_of
from modeling.moe import SharedExpert, SparseMoe
from modeling.operations import Operations, TorchOperations
from modeling.quantized.packed import BlockPacked, Packed, StackedRows, Weight, nibble_values, stacked_rows
from modeling.ranks import RankGroup
from modeling.routing import SigmoidTopK, SoftmaxTopK
from modeling.tiles import LEAVES, tree_sum
from tests.kernels.products import close, sum_products_in_order

EXPERTS, HIDDEN, WIDTH = 4, 64, 128


def plain(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) / 8


def fp8(*shape: int, block: int = 16) -> BlockPacked:
    *lead, out, width = shape
    codes = (torch.randn(*shape) * 8).to(torch.float8_e4m3fn)
    return BlockPacked(codes, None, torch.rand(*lead, -(-out // block), -(-width // block)) / 64, (block, block))


def int4(*shape: int) -> BlockPacked:
    *lead, out, width = shape
    codes = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8)
    return BlockPacked(codes, nibble_values("int4"), (torch.rand(*lead, out, width // 32) / 32).bfloat16(), (1, 32))


def nvfp4(*shape: int) -> BlockPacked:
    *lead, out, width = shape
    codes = torch.randint(0, 256, (*lead, out, width // 2), dtype=torch.uint8)
    scales = torch.rand(*lead, out, width // 16).to(torch.float8_e4m3fn)
    return BlockPacked(codes, nibble_values("e2m1"), scales, (1, 16), factor=torch.rand(lead) / 16)


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on a whole dequantized matrix is a failure."""

    def forbid() -> None:
        def dequantize(self: Packed, dtype: torch.dtype) -> torch.Tensor:
            raise AssertionError("a packed weight was dequantized as a whole")

        monkeypatch.setattr(BlockPacked, "dequantize", dequantize)
        monkeypatch.setattr(StackedRows, "dequantize", dequantize)

    return forbid


@pytest.mark.parametrize("make", [plain, fp8, int4, nvfp4])
def test_a_linear_layer_of_stacked_parts_is_torchs(make, never_whole):
    weight, bias, x = stacked_rows([make(48, 64), make(32, 64), make(24, 64)]), torch.randn(104), torch.randn(2, 3, 64)
    want = fixed_linear(weight, bias)(x)
    never_whole()
    close(TritonLinear(weight, bias)(x), want)


def test_parts_that_are_packed_alike_become_one_launch():
    assert len(matrices_of(StackedRows([fp8(32, 64), fp8(24, 64)]))) == 1
    assert len(matrices_of(StackedRows([fp8(24, 64), fp8(32, 64)]))) == 2  # a block would begin at row 24
    assert len(matrices_of(StackedRows([int4(3, 64), int4(5, 64), plain(4, 64)]))) == 2
    assert len(matrices_of(StackedRows([nvfp4(4, 64), nvfp4(4, 64)]))) == 2  # each has its factor


def test_hundreds_of_rows_of_a_plain_weight_are_torchs_product_but_not_if_bits_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("modeling.kernel_linear.linear", lambda *arguments, out, **_: out.fill_(7.0))
    x, weight = torch.randn(256, 32), torch.randn(16, 32)
    assert torch.equal(TritonLinear(weight)(x), torch.nn.functional.linear(x, weight))
    assert (TritonLinear(weight)(x[:255]) == 7).all()
    assert (TritonLinear(weight, deterministic=True)(x) == 7).all()


def test_a_deterministic_linear_layer_has_the_same_bits_whatever_share_of_its_output_a_rank_has(
    monkeypatch: pytest.MonkeyPatch,
):
    sum_products_in_order(monkeypatch)
    monkeypatch.setattr("kernels.linear.kernel.PROGRAMS", 2)
    monkeypatch.setattr("kernels.linear.kernel.SHORTEST", 32)
    x, weight = torch.randn(2, 256), plain(128, 256)
    for deterministic in (True, False):
        whole, half = (TritonLinear(part, deterministic=deterministic)(x) for part in (weight, weight[:64]))
        assert torch.equal(whole[:, :64], half) == deterministic


@pytest.mark.parametrize("make", [plain, fp8, int4, nvfp4])
def test_experts_are_those_of_a_loop(make, never_whole):
    parts = [make(EXPERTS, WIDTH, HIDDEN), make(EXPERTS, WIDTH, HIDDEN)]
    weights = ExpertWeights(stacked_rows(parts), make(EXPERTS, HIDDEN, WIDTH))
    x, shares, chosen = torch.randn(5, HIDDEN), torch.rand(5, 2), torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    want = make_experts(weights)(x, shares, chosen)
    never_whole()
    close(TritonOperations().experts(weights)(x, shares, chosen), want)


def test_experts_with_biases_and_a_clamped_gate_are_those_of_a_loop():
    biases = torch.randn(EXPERTS, 2 * WIDTH), torch.randn(EXPERTS, HIDDEN)
    weights = ExpertWeights(plain(EXPERTS, 2 * WIDTH, HIDDEN), int4(EXPERTS, HIDDEN, WIDTH), *biases)
    gate = ClampedGate(alpha=1.702, limit=1.0)
    x, shares, chosen = torch.randn(3, HIDDEN), torch.rand(3, 2), torch.tensor([[0, 1], [3, 1], [2, 0]])
    close(TritonOperations().experts(weights, gate)(x, shares, chosen), make_experts(weights, gate)(x, shares, chosen))


def moe(operations: Operations, weights: Mapping[str, Weight], route, ranks: RankGroup | None = None) -> SparseMoe:
    shared = SharedExpert(weights["shared_gate_up"], weights["shared_down"], weights["shared_gate"])  # type: ignore[arg-type]
    experts = operations.experts(ExpertWeights(weights["gate_up"], weights["down"]), silu_gate)
    router = weights["router"]
    assert isinstance(router, torch.Tensor)
    return SparseMoe(router, experts, shared, route=route, ranks=ranks or RankGroup(), operations=operations)


def mixture(make) -> dict[str, Weight]:
    return {
        "router": plain(EXPERTS, HIDDEN),
        "gate_up": stacked_rows([make(EXPERTS, WIDTH, HIDDEN), make(EXPERTS, WIDTH, HIDDEN)]),
        "down": make(EXPERTS, HIDDEN, WIDTH),
        "shared_gate_up": stacked_rows([make(WIDTH, HIDDEN), make(WIDTH, HIDDEN)]),
        "shared_down": make(HIDDEN, WIDTH),
        "shared_gate": plain(1, HIDDEN),
    }


@pytest.mark.parametrize(
    "route",
    [SoftmaxTopK(2, True), SigmoidTopK(torch.tensor([0.1, 0.0, -0.1, 0.2]), 2, 2, 1, True, 2.5)],
    ids=["softmax", "sigmoid"],
)
def test_a_mixture_over_kernels_is_that_over_torch(route, never_whole):
    weights, x = mixture(fp8), torch.randn(1, 4, HIDDEN)
    with torch.inference_mode():
        want = moe(TorchOperations(), weights, route)(x)
        never_whole()
        close(moe(TritonOperations(), weights, route)(x), want)


def part_of(name: str, weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What a rank of `size` holds of a mixture's plain weight."""
    own = slice(rank * WIDTH // size, (rank + 1) * WIDTH // size)
    if name.endswith("gate_up"):
        return torch.cat([half[..., own, :] for half in weight.chunk(2, dim=-2)], dim=-2)
    return weight[..., own].contiguous() if name.endswith("down") else weight


def test_a_deterministic_mixture_has_the_same_bits_alone_and_divided(monkeypatch: pytest.MonkeyPatch):
    sum_products_in_order(monkeypatch)
    weights, x, route = mixture(plain), torch.randn(18, HIDDEN), SoftmaxTopK(2, True)
    totals = []
    for size in (1, 2):
        operations = DeterministicTritonOperations(torch.float32, size, device="cpu")
        branches = []
        for rank in range(size):
            own = {name: part_of(name, weight, rank, size) for name, weight in weights.items()}  # type: ignore[arg-type]
            layer = moe(operations, own, route)
            layer.total = lambda partial, ranks: tree_sum(partial)
            branches.append(layer(x))
            assert operations.experts(ExpertWeights(own["gate_up"], own["down"]))(
                x[:1], torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
            ).shape == (LEAVES // size, 1, HIDDEN)
        totals.append(tree_sum(torch.stack(branches)))
    assert torch.equal(totals[0], totals[1])
    alone = moe(DeterministicTritonOperations(torch.float32, device="cpu"), weights, route)
    assert torch.equal(torch.cat([alone(x[i : i + 1]) for i in (0, 17)]), totals[0][[0, 17]])
    close(totals[0], moe(TorchOperations(), weights, route)(x))


def test_what_no_kernel_knows_is_refused():
    weights = ExpertWeights(plain(2, 8, 16), plain(2, 16, 4))
    with pytest.raises(ValueError, match="no kernel computes the gate"):
        TritonOperations().experts(weights, torch.relu)
    with pytest.raises(ValueError, match="no kernel chooses experts"):
        TritonOperations().route(lambda logits: (logits, logits))
    with pytest.raises(ValueError, match="2 formats"):
        DeterministicTritonOperations(torch.float32).partial_linear(StackedRows([plain(8, 32), int4(8, 32)]))
