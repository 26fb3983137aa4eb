"""Runs a flight record again: the same rows in the same batches, on slots and KV blocks of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.errors import PacelineError
from verifier_service.acceptance import accepted_drafts
from verifier_service.flight import SampledRows
from verifier_service.grammar.compiler import GrammarCompiler
from verifier_service.grammar.masks import NO_MASKS, MaskFiller
from verifier_service.model.face import ForwardOutput, Runner
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow
from verifier_service.recorder import Flight, FlightRequest, FlightRow, FlightStep
from verifier_service.sampling.sampler import sample
from verifier_service.sampling.shaping import draws_of, shaping_of
from verifier_service.sequence import RunningRequest


@dataclass(frozen=True)
class Difference:
    """The target said `replayed` at `position` of a request's tokens, where the record has `recorded`.

    gap: logit of the best token minus that of the recorded one, in the replay. A token of -1 is none at all: the
    logits were not finite.
    """

    step: int
    request_id: str
    choice: int
    position: int
    recorded: int
    replayed: int
    gap: float


@dataclass(frozen=True)
class Replayed:
    """One step, run again. compared: rows with a recorded sample. error: what the forward raised."""

    step: int
    compared: int
    differences: tuple[Difference, ...]
    error: str | None = None


def sizes(flight: Flight) -> tuple[int, int, int]:
    """(slots, KV blocks, longest context) that a replay needs of its runner."""
    lengths = [0] * len(flight.requests)
    for step in flight.steps:
        for row in step.rows:
            lengths[row.request] = max(lengths[row.request], row.start + len(row.token_ids))
    block = flight.target.block_tokens
    return len(lengths), sum(-(-length // block) for length in lengths), max(lengths, default=1)


class Replay:
    """runner: built with `sizes`, on one rank. Every request keeps its slot to the end.

    grammars: needed if a request has a grammar.
    """

    def __init__(
        self, flight: Flight, runner: Runner, grammars: GrammarCompiler | None = None, chunk_tokens: int = 512
    ):
        self._flight, self._runner, self._chunk_tokens = flight, runner, chunk_tokens
        self._grammars = grammars
        self._masks = MaskFiller(runner.shape.vocabulary)
        self._block_tokens = flight.target.block_tokens
        self._free = iter(range(sizes(flight)[1]))
        self._owned = [0] * len(flight.requests)  # blocks
        self._computed = [0] * len(flight.requests)  # tokens in the replay's KV cache
        self._taken = [0] * len(flight.requests)  # each one's token in the last step it was in
        self._number = 0

    def steps(self) -> Iterator[Replayed]:
        """Step by step; ends after one whose forward raises. Raises PacelineError for rows that contradict requests."""
        for step in self._flight.steps:
            firsts: dict[int, FlightRow] = {}  # a prompt's chunks may follow each other within a step
            for row in step.rows:
                firsts.setdefault(row.request, row)
            for row in firsts.values():
                self._catch_up(row)
            try:
                result = self._run(step)
            except Exception as error:  # whatever ended the engine is what is looked for
                yield Replayed(step.step, 0, (), f"{type(error).__name__}: {error}")
                return
            yield result

    def _catch_up(self, row: FlightRow) -> None:
        """What a request had in the KV cache before the step, where the record does not say how it came there."""
        if self._computed[row.request] == row.start:
            return
        known = self._flight.requests[row.request].token_ids
        if len(known) < row.start:
            raise PacelineError(f"the record has {len(known)} tokens of a request whose row starts at {row.start}")
        self._computed[row.request] = 0
        for start in range(0, row.start, self._chunk_tokens):
            tokens = known[start : min(start + self._chunk_tokens, row.start)]
            self._forward((), (PrefillChunk(row.request, start, tokens, False),))
            self._computed[row.request] += len(tokens)

    def _run(self, step: FlightStep) -> Replayed:
        verify = [self._known(row) for row in step.rows if row.verify]
        prefill = [row for row in step.rows if not row.verify]
        output = self._forward(
            tuple(VerifyRow(row.request, row.start, row.token_ids) for row in verify),
            tuple(PrefillChunk(row.request, row.start, row.token_ids, row.completes_prompt) for row in prefill),
        )
        assert output.logits is not None, "the only rank is the first"
        sampled = self._sampled([*verify, *prefill], step.samples)
        constrained = [rows for rows in sampled if rows.sequence.request.grammar is not None]
        masks = self._masks.start(constrained)() if constrained else NO_MASKS
        tokens = sample(output.logits, draws_of(sampled, masks)) if output.logits.shape[0] else []
        recorded = step.samples
        differences = []
        if recorded is not None:
            best = output.logits.amax(dim=-1)
            for rows in sampled:
                for row in range(rows.row, rows.row + rows.count):
                    if tokens[row] != recorded[row]:
                        gap = float(best[row] - output.logits[row, recorded[row]]) if recorded[row] >= 0 else 0.0
                        position = rows.position + row - rows.row
                        differences.append(
                            Difference(step.step, *rows.sequence.key, position, recorded[row], tokens[row], gap)
                        )
        self._commit(verify, prefill, recorded if recorded is not None else tokens)
        compared = 0 if recorded is None else sum(rows.count for rows in sampled)
        return Replayed(step.step, compared, tuple(differences))

    def _known(self, row: FlightRow) -> FlightRow:
        """A row whose token nobody had read begins with the one that the replay took; where that is none, with 0, as
        the engine has it."""
        return row if row.token_ids[0] >= 0 else replace(row, token_ids=(max(0, self._taken[row.request]),))

    def _sampled(self, rows: list[FlightRow], recorded: Sequence[int] | None) -> list[SampledRows]:
        """Without those that came to nothing, their request being over: how their tokens were taken is not known."""
        found, at = [], 0
        for row in rows:
            count = len(row.token_ids) if row.verify else int(row.completes_prompt)
            end = row.start + (1 if row.verify else len(row.token_ids))  # one past the last token that is certain
            request = self._flight.requests[row.request]
            in_vain = recorded is not None and count > 0 and end >= len(request.token_ids) and recorded[at] >= 0
            if count and not in_vain:
                sequence = self._as_it_was(request, end)
                found.append(SampledRows(sequence, at, count, end, row.token_ids[1:] if row.verify else ()))
            at += count
        return found

    def _commit(self, verify: list[FlightRow], prefill: list[FlightRow], samples: Sequence[int]) -> None:
        at = 0
        decided = []
        for row in verify:
            kept = accepted_drafts(row.token_ids, samples, at) + 1
            at += len(row.token_ids)
            decided.append((row.request, kept))
            self._computed[row.request] = row.start + kept
            self._taken[row.request] = samples[at - len(row.token_ids) + kept - 1]
        for row in prefill:
            self._computed[row.request] = row.start + len(row.token_ids)
            if row.completes_prompt:
                self._taken[row.request] = samples[at]
                at += 1
        if decided:
            self._forward((), (), tuple(decided))

    def _forward(
        self,
        verify: tuple[VerifyRow, ...],
        prefill: tuple[PrefillChunk, ...],
        decided: tuple[tuple[int, int], ...] = (),
    ) -> ForwardOutput:
        blocks: list[tuple[int, int]] = []
        everything: list[VerifyRow | PrefillChunk] = [*verify, *prefill]
        for work in everything:
            needed = -(-(work.start + len(work.token_ids)) // self._block_tokens)
            while self._owned[work.slot] < needed:
                self._owned[work.slot] += 1
                blocks.append((work.slot, next(self._free)))
        self._number += 1
        return self._runner.forward(
            StepPlan(self._number, verify, prefill, new_blocks=tuple(blocks), decided=decided, heartbeat=bool(decided))
        )

    def _as_it_was(self, request: FlightRequest, tokens: int) -> RunningRequest:
        """The request with its first `tokens` tokens only."""
        asked = request.request
        constraint = None
        if asked.grammar is not None:
            assert self._grammars is not None, "a record with a grammar is replayed with a compiler"
            generated = request.token_ids[len(asked.prompt_ids) : tokens]
            constraint = self._grammars.compile(replace(asked, generated_ids=generated))
        sequence = RunningRequest(asked, (0, 0), shaping=shaping_of(asked, constraint))
        sequence.tokens = list(request.token_ids[:tokens])
        return sequence
