"""What a drafter's confidence is worth: measured by which of its drafts were right. Pure policy."""

from __future__ import annotations

from collections.abc import Sequence

BINS = 8  # of confidence; 1.0, to which half precision rounds, is one more
TRUST = 2.0  # drafts of a bin that have to be verified for them to say as much as the confidence itself
SHARED = 8.0  # the same for a position in the block against all positions
MEMORY = 128.0  # drafts of a bin, after which older ones count half


class Calibration:
    """P(draft right | all before it in the block right), by its confidence and its position; most: drafts of a block.

    Positions behind the first wrong draft, or not verified, are censored: they say nothing.
    """

    def __init__(self, most: int):
        self.most = most
        self._bins = [[0.0, 0.0] for _ in range(BINS + 1)]  # right, verified
        self._cells = [[[0.0, 0.0] for _ in range(BINS + 1)] for _ in range(most)]
        self._table = [[self._of(cell, bin) for bin, cell in enumerate(row)] for row in self._cells]

    def survivals(self, confidence: Sequence[float]) -> list[float]:
        """P(all drafts up to each one are right)."""
        survival, out = 1.0, []
        for row, sure in zip(self._table, confidence):
            survival *= row[int(sure * BINS)]
            out.append(survival)
        return out

    def right(self, confidence: Sequence[float], count: int) -> float:
        """How many of the first `count` drafts are expected to be right."""
        survival, total = 1.0, 0.0
        for row, sure, _ in zip(self._table, confidence, range(count)):
            survival *= row[int(sure * BINS)]
            total += survival
        return total

    def kept(self, answers: Sequence[Sequence[float]], least: float) -> list[int]:
        """Of each answer, how many drafts all stand with at least that chance."""
        table, kept = self._table, []
        for confidence in answers:
            survival, count = 1.0, 0
            for row, sure in zip(table, confidence):
                survival *= row[int(sure * BINS)]
                if survival < least:
                    break
                count += 1
            kept.append(count)
        return kept

    def learn(self, confidence: Sequence[float], drafted: int, accepted: int) -> None:
        """One row: the first `drafted` drafts were verified, the first `accepted` of them right."""
        known = accepted + 1 if accepted < drafted else drafted
        for position, (sure, cells, row) in enumerate(zip(confidence[:known], self._cells, self._table)):
            bin = int(sure * BINS)
            cell, everywhere = cells[bin], self._bins[bin]
            if everywhere[1] >= MEMORY:
                everywhere[0] /= 2
                everywhere[1] /= 2
            if cell[1] >= MEMORY:
                cell[0] /= 2
                cell[1] /= 2
            right = position < accepted
            everywhere[0] += right
            everywhere[1] += 1
            cell[0] += right
            cell[1] += 1
            row[bin] = self._of(cell, bin)

    def _of(self, cell: list[float], bin: int) -> float:
        right, verified = self._bins[bin]
        everywhere = (right + TRUST * min((bin + 0.5) / BINS, 0.98)) / (verified + TRUST)
        return (cell[0] + SHARED * everywhere) / (cell[1] + SHARED)
