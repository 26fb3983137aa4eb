"""Random schedules of step plans, and what a runner must answer to them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from verifier_service.model.face import ForwardOutput
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

BLOCK_TOKENS = 4
SLOTS = 3
BLOCKS = 80


@dataclass(frozen=True)
class Cell:
    """A row of an output that is checked against position `position` of sequence `sequence`."""

    row: int
    sequence: int
    position: int


@dataclass(frozen=True)
class PlannedStep:
    plan: StepPlan
    logits: tuple[Cell, ...]
    taps: tuple[Cell, ...]


@dataclass
class _Running:
    slot: int
    sequence: int
    prompt: int
    done: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """Stock outputs for the sequences: logits and hidden states of one full forward each."""

    logits: list[torch.Tensor]
    hidden: list[tuple[torch.Tensor, ...]]


def sequences(count: int, vocabulary: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(rng.randint(20, 110))] for _ in range(count)]


def reference(model: torch.nn.Module, texts: list[list[int]]) -> Reference:
    with torch.no_grad():
        outputs = [model(torch.tensor([text]), use_cache=False, output_hidden_states=True) for text in texts]
    return Reference([o.logits[0] for o in outputs], [tuple(h[0] for h in o.hidden_states) for o in outputs])


def schedule(texts: list[list[int]], vocabulary: int, seed: int, longest_block: int = 6) -> list[PlannedStep]:
    """Run every text through prompt chunks, then verify blocks whose drafts are right up to a random point."""
    rng = random.Random(seed)
    free = list(range(BLOCKS))
    rng.shuffle(free)
    waiting = list(range(len(texts)))
    running: dict[int, _Running] = {}
    steps: list[PlannedStep] = []
    decided: list[tuple[int, int]] = []
    released: list[int] = []
    while waiting or running:
        for slot in range(SLOTS):
            if slot not in running and waiting:
                sequence = waiting.pop(0)
                running[slot] = _Running(slot, sequence, rng.randint(1, len(texts[sequence]) - 4))
        verify: list[VerifyRow] = []
        prefill: list[PrefillChunk] = []
        new_blocks: list[tuple[int, int]] = []
        kept: list[tuple[int, int]] = []
        next_released: list[int] = []
        verified: list[tuple[_Running, int]] = []
        chunked: list[tuple[_Running, PrefillChunk]] = []
        for request in list(running.values()):
            text = texts[request.sequence]
            if rng.random() < 0.2:  # sits this step out
                continue
            if request.done < request.prompt:
                count = min(rng.choice((1, 3, 20, 70)), request.prompt - request.done)
                chunk = PrefillChunk(
                    request.slot,
                    request.done,
                    tuple(text[request.done : request.done + count]),
                    request.done + count == request.prompt,
                )
                prefill.append(chunk)
                chunked.append((request, chunk))
                end = request.done = request.done + count
            else:
                right = min(rng.randint(1, longest_block), len(text) - request.done)
                wrong = rng.randint(0, longest_block - right)
                tokens = text[request.done : request.done + right] + [rng.randrange(vocabulary) for _ in range(wrong)]
                verify.append(VerifyRow(request.slot, request.done, tuple(tokens)))
                verified.append((request, right))
                kept.append((request.slot, right))
                end = request.done + len(tokens)
            while len(request.blocks) * BLOCK_TOKENS < end:
                request.blocks.append(free.pop())
                new_blocks.append((request.slot, request.blocks[-1]))
        cells, rows = [], 0
        for (request, right), work in zip(verified, verify):
            cells += [Cell(rows + i, request.sequence, work.start + i) for i in range(right)]
            rows += len(work.token_ids)
        flat = rows
        tap_cells = list(cells)
        for request, chunk in chunked:
            tap_cells += [Cell(flat + i, request.sequence, chunk.start + i) for i in range(len(chunk.token_ids))]
            flat += len(chunk.token_ids)
            if chunk.completes_prompt:
                cells.append(Cell(rows, request.sequence, request.prompt - 1))
                rows += 1
        plan = StepPlan(len(steps), tuple(verify), tuple(prefill), tuple(new_blocks), tuple(released), tuple(decided))
        steps.append(PlannedStep(plan, tuple(cells), tuple(tap_cells)))
        for request, right in verified:
            request.done += right
            if request.done == len(texts[request.sequence]):
                next_released.append(request.slot)
                free += request.blocks
                rng.shuffle(free)
                del running[request.slot]
        decided, released = kept, next_released
    return steps


def worst_difference(
    outputs: list[ForwardOutput], steps: list[PlannedStep], expected: Reference, taps: tuple[int, ...]
) -> tuple[float, float]:
    """Largest absolute difference of checked logits and of checked taps."""
    logits = hidden = 0.0
    for output, step in zip(outputs, steps, strict=True):
        for cell in step.logits:
            assert output.logits is not None
            want = expected.logits[cell.sequence][cell.position]
            logits = max(logits, (output.logits[cell.row] - want).abs().max().item())
        for cell in step.taps if taps else ():
            assert output.taps is not None
            want = torch.cat([expected.hidden[cell.sequence][layer + 1][cell.position] for layer in taps])
            hidden = max(hidden, (output.taps[cell.row] - want).abs().max().item())
    return logits, hidden
