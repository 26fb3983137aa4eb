"""The PTX that turns codes of four bits into bfloat16, run instruction by instruction."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from kernels.linear import nibbles
from kernels.linear.matrix import E2M1

MASK = 0xFFFFFFFF


def permuted(first: int, second: int, selector: int) -> int:
    octets = [(value >> 8 * place) & 255 for value in (first, second) for place in range(4)]
    return sum(octets[(selector >> 4 * place) & 7] << 8 * place for place in range(4))


def of_three(a: int, b: int, c: int, table: int) -> int:
    """PTX's lop3: bit by bit, the table's bit that the three name."""
    places = ((4 * (a >> bit & 1) + 2 * (b >> bit & 1) + (c >> bit & 1), bit) for bit in range(32))
    return sum((table >> index & 1) << bit for index, bit in places)


def pair(register: int) -> torch.Tensor:
    """The two bfloat16 of a register, the lower one first."""
    return torch.tensor([register], dtype=torch.int64).to(torch.int32).view(torch.bfloat16)


def fused(a: int, b: int, c: int) -> int:
    total = (pair(a).double() * pair(b).double() + pair(c).double()).bfloat16()
    return int(total.view(torch.int32).item()) & MASK


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "prmt.b32": permuted,
    "lop3.b32": of_three,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & MASK,
    "shr.u32": lambda a, b: a >> b,
    "fma.rn.bf16x2": fused,
}


def run(assembly: str, four_bytes: int) -> list[int]:
    """What is in $0..$3 at the end."""
    registers = {"$4": four_bytes}
    for line in assembly.strip("{} \n").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and not name.startswith(".reg"):
            target, *sources = re.split(r",\s*", operands)
            values = [registers[source] if source in registers else int(source, 0) for source in sources]
            registers[target] = INSTRUCTIONS[name](*values)
    return [registers[f"${number}"] for number in range(4)]


@pytest.mark.parametrize(
    ("assembly", "meant"),
    [
        (nibbles.INT4_PAIRS, [code - 8.0 for code in range(16)]),
        (nibbles.E2M1_PAIRS, [*E2M1, *(-value for value in E2M1)]),
    ],
    ids=["int4", "e2m1"],
)
def test_every_byte_becomes_its_two_numbers_wherever_it_stands(assembly, meant: list[float]):
    text = getattr(assembly, "value", assembly)
    for byte in range(256):
        octets = [byte, byte ^ 0x5A, byte ^ 0xFF, (byte * 7 + 3) & 255]
        made = torch.cat([pair(register) for register in run(text, sum(o << 8 * i for i, o in enumerate(octets)))])
        assert made.tolist() == [meant[o & 15] for o in octets] + [meant[o >> 4] for o in octets]


@pytest.mark.parametrize("meant", [[code - 8.0 for code in range(16)], list(E2M1)], ids=["int4", "e2m1"])
def test_a_number_times_a_scale_of_bfloat16_is_rounded_as_from_float32(meant: list[float]):
    scales = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16)
    scales = scales[scales.isfinite()]
    for number in meant:
        exact = scales.double() * number
        assert torch.equal(exact.bfloat16(), (scales.float() * number).bfloat16())
