"""The target's output head over a vocabulary of 151,936: tokens without logits, and logits for those who need them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from kernels.acceptance import kernel as acceptance
from kernels.head import kernel as head
from kernels.head import reference as head_reference
from kernels.linear.matrix import Matrix
from tests.gpu.case import Case, Machine
from tests.gpu.cases_linear import random_matrix


def head_cases(machine: Machine) -> Iterator[Case]:
    width, vocabulary = (4096, 151_936) if machine.shrink == 1 else (256, 300)
    weight = random_matrix(machine, "plain", vocabulary, width)
    sizes = [(1, 0.0), (16, 0.0), (16, 1.0), (64, 1.0), (256, 1.0), (1024, 0.0), (1024, 1.0)]
    for rows, temperature in sizes if machine.shrink == 1 else sizes[-1:]:
        yield _race(machine, "plain", weight, -(-rows // machine.shrink), temperature)
    yield _race(machine, "FP8", random_matrix(machine, "FP8", vocabulary, width), -(-16 // machine.shrink), 1.0)
    yield _logits(machine, weight, -(-16 // machine.shrink))
    yield _same_token(machine, weight, 1024 if machine.shrink == 1 else 130)
    yield _same_bits(machine, weight)


def _params(machine: Machine, rows: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randint(-(2**62), 2**62, (rows,), device=machine.device)
    return keys, torch.full((rows,), temperature, dtype=torch.float64, device=machine.device)


def _race(machine: Machine, label: str, weight: Matrix, rows: int, temperature: float) -> Case:
    (vocabulary, width), params = weight.shape, _params(machine, rows, temperature)
    hidden = machine.normal(rows, width)
    # Scores: of two equally good tokens, rounding may choose either.
    return Case(
        f"head_race {label}, {rows} rows, {width} -> {vocabulary}, temperature {temperature}",
        lambda: head.head_race(hidden, weight, *params)[1],
        lambda: head_reference.head_race(hidden, weight, *params)[1],
        moved=weight.nbytes + hidden.nbytes,
        flops=2 * rows * width * vocabulary,
        library=(lambda: (hidden @ weight.codes.t()).argmax(-1)) if label == "plain" else None,
    )


def _logits(machine: Machine, weight: Matrix, rows: int) -> Case:
    vocabulary, width = weight.shape
    hidden = machine.normal(rows, width)
    return Case(
        f"head_logits {rows} rows, {width} -> {vocabulary}",
        lambda: head.head_logits(hidden, weight),
        lambda: head_reference.head_logits(hidden, weight),
        moved=weight.nbytes + hidden.nbytes + 4 * rows * vocabulary,
        flops=2 * rows * width * vocabulary,
        library=lambda: hidden @ weight.codes.t(),
    )


def _same_token(machine: Machine, weight: Matrix, rows: int) -> Case:
    """From stored logits the same scores, to the bit: whether a batch mate needs logits decides nothing."""
    vocabulary, width = weight.shape
    hidden, params = machine.normal(rows, width), _params(machine, rows, 1.0)
    params[1][::2] = 0.0

    def stored() -> tuple[torch.Tensor, ...]:
        return acceptance.sample(head.head_logits(hidden, weight), *params)

    return Case(
        f"head_race {rows} rows, {width} -> {vocabulary}, bit by bit against tokens taken from stored logits",
        lambda: head.head_race(hidden, weight, *params),
        stored,
        moved=weight.nbytes + hidden.nbytes,
        flops=2 * rows * width * vocabulary,
        library=stored,
        tolerance=1e-12,
    )


def _same_bits(machine: Machine, weight: Matrix) -> Case:
    """130 rows at once against the same rows 1, 16, 32, 64 and 17 at a time: the difference must be none at all."""
    vocabulary, width = weight.shape
    hidden, params = machine.normal(130, width), _params(machine, 130, 1.0)
    sizes = [1, 16, 32, 64, 17]

    def apart() -> torch.Tensor:
        given: list[Any] = [part.split(sizes) for part in (hidden, *params)]
        return torch.cat([head.head_race(own, weight, *rest)[1] for own, *rest in zip(*given)])

    # In the interpreter a product is BLAS's, which rounds by the whole's shape.
    return Case(
        f"head_race 130 rows, {width} -> {vocabulary}, bit by bit against 1, 16, 32, 64 and 17 rows",
        lambda: head.head_race(hidden, weight, *params)[1],
        apart,
        moved=weight.nbytes + hidden.nbytes,
        flops=2 * 130 * width * vocabulary,
        tolerance=1e-12 if machine.device == "cuda" else 1e-4,
    )
