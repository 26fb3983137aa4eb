"""The steps that take the most memory of all that an engine can plan. Plain Python.

Attention that cuts contexts into sections keeps partial sums for every row and section, so that a step is largest at
the end of the longest context. One request there is enough: sections are those of the longest context of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow


@dataclass(frozen=True)
class LargestSteps:
    """verify_rows, step_tokens: tokens of a step's verify rows, and of all of a step, at most. sectioned_rows: contexts
    are cut in a step of no more tokens.

    Contexts lie over few blocks that follow each other again and again, the same for all slots: what is computed means
    nothing, but takes the memory that it would.
    """

    slots: int
    verify_rows: int
    step_tokens: int
    block_tokens: int
    max_context: int
    sectioned_rows: int

    @property
    def blocks(self) -> int:
        """Of the KV cache that these steps need: as many as one slot's part of a step may write to."""
        return 1 + self._blocks_of(self._most)

    def tables(self) -> StepPlan:
        """To be executed first. Slot 0 has the longest context, the others have what they take of a step."""
        entries = (self._blocks_of(self.max_context if slot == 0 else self._most) for slot in range(self.slots))
        cells = ((slot, index % self.blocks) for slot, count in enumerate(entries) for index in range(count))
        return StepPlan(0, new_blocks=tuple(cells))

    def plans(self) -> Iterator[StepPlan]:
        """To be executed one after the other, each beside the output of the one before."""
        verify = self._verify()
        yield StepPlan(1, prefill=self._prefill(self.step_tokens))
        yield StepPlan(2, prefill=self._prefill(min(self.step_tokens, self.sectioned_rows)))
        yield StepPlan(3, verify=verify)
        others = sum(len(row.token_ids) for row in verify[1:])
        if 0 < others < self.step_tokens:
            yield StepPlan(4, verify=verify[1:], prefill=self._prefill(self.step_tokens - others)[:1])
        yield StepPlan(5, decided=tuple((row.slot, 1) for row in verify[1:]), verify=verify)

    @property
    def _most(self) -> int:
        """Tokens of one slot in a step."""
        return min(max(self.step_tokens, -(-self.verify_rows // self.slots)), self.max_context)

    def _verify(self) -> tuple[VerifyRow, ...]:
        each, more = divmod(self.verify_rows, self.slots)
        counts = [min(each + (slot < more), self.max_context) for slot in range(self.slots)]
        starts = [self.max_context - counts[0]] + [0] * (self.slots - 1)
        return tuple(VerifyRow(slot, starts[slot], (0,) * count) for slot, count in enumerate(counts) if count)

    def _prefill(self, tokens: int) -> tuple[PrefillChunk, ...]:
        """Of slot 0, up to the end of its context; of others what is more than that context."""
        chunks: list[PrefillChunk] = []
        for slot in range(self.slots):
            count = min(tokens, self.max_context)
            if not count:
                break
            chunks.append(PrefillChunk(slot, 0 if slot else self.max_context - count, (0,) * count, True))
            tokens -= count
        return tuple(chunks)

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)
