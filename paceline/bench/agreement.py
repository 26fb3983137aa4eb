"""Is a row's text the target's own? Equal to the reference's, or different only where two logits tie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

TIE = 1e-4  # difference of logits below which either token may win

TokenIds = tuple[int, ...]
Gaps = Callable[[TokenIds, TokenIds], Sequence[float]]


@dataclass(frozen=True)
class Difference:
    """Where a text first leaves the target's own. gap: logits between the best token and the one in the text."""

    prompt: int
    position: int
    gap: float | None


@dataclass(frozen=True)
class Agreement:
    """Over all prompts and repeats. equal, ties: texts; difference: the first that is neither, or None."""

    equal: int
    ties: int
    different: int
    difference: Difference | None

    def __str__(self) -> str:
        total = self.equal + self.ties + self.different
        if self.difference is None:
            return "equal" if not self.ties else f"equal, {self.ties} of {total} by ties"
        where = f"prompt {self.difference.prompt}, token {self.difference.position}"
        gap = "" if self.difference.gap is None else f", logits {self.difference.gap:.2g} apart"
        return f"{self.different} of {total} differ: {where}{gap}"


def compare(
    prompts: Sequence[TokenIds],
    reference: Sequence[TokenIds],
    runs: Sequence[Sequence[TokenIds]],
    gaps: Gaps | None,
) -> Agreement:
    """reference and each of runs: texts in the prompts' order.

    gaps(prompt, text): by how much the target's best logit exceeds that of each token of the text, teacher-forced.
    A text that differs counts as a tie if every gap is at most TIE. Without `gaps` any difference is a difference.
    """
    judged: dict[tuple[int, TokenIds], Difference | None] = {}
    equal = ties = different = 0
    first: Difference | None = None
    for run in runs:
        for index, text in enumerate(run):
            if text == reference[index]:
                equal += 1
                continue
            key = (index, text)
            if key not in judged:
                judged[key] = _judge(index, prompts[index], reference[index], text, gaps)
            found = judged[key]
            ties += found is None
            different += found is not None
            first = first or found
    return Agreement(equal, ties, different, first)


def _judge(index: int, prompt: TokenIds, reference: TokenIds, text: TokenIds, gaps: Gaps | None) -> Difference | None:
    """None if only ties separate the two."""
    shared = next((i for i, (a, b) in enumerate(zip(reference, text)) if a != b), min(len(reference), len(text)))
    if gaps is None or shared == min(len(reference), len(text)):  # one ends where the other goes on: never a tie
        return Difference(index, shared, None)
    for position, gap in enumerate(gaps(prompt, text)):
        if gap > TIE:
            return Difference(index, position, gap)
    return None
