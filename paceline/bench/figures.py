"""From runs to the rows of the table: medians over interleaved repeats, ratios within a repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from paceline.bench.agreement import Agreement
from paceline.bench.loops import Tau, tau
from paceline.bench.runs import Run


@dataclass(frozen=True)
class Row:
    """One decoder at one concurrency. tokens_per_s: median; slowest, fastest: over the repeats.

    ratio: to plain decoding of the same repeat, median. draft_share, gap_share: of the step's time, 0..1, as in Run.
    link_bytes: sent per token of context. text: agreement in words. None = not applicable.
    """

    name: str
    concurrency: int
    tokens_per_s: float
    slowest: float
    fastest: float
    ratio: float | None
    tau: Tau | None
    draft_share: float | None
    gap_share: float | None
    link_bytes: float | None
    text: str
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    name: str
    reason: str


def row(
    name: str,
    concurrency: int,
    runs: Sequence[Run],
    plain: Sequence[Run] | None,
    agreement: Agreement | None,
    note: str = "",
) -> Row:
    """runs and plain: one of each per repeat, in the order of the repeats."""
    speeds = [run.tokens / run.seconds for run in runs]
    ratio = None
    if plain:
        ratio = median(ours / (theirs.tokens / theirs.seconds) for ours, theirs in zip(speeds, plain))
    drafted = any(output.commits for run in runs for output in run.outputs)
    return Row(
        name=name,
        concurrency=concurrency,
        tokens_per_s=median(speeds),
        slowest=min(speeds),
        fastest=max(speeds),
        ratio=ratio,
        tau=tau([(o.token_ids, o.commits) for run in runs for o in run.outputs]) if drafted else None,
        draft_share=_draft_share(runs),
        gap_share=_gap_share(runs),
        link_bytes=_link_bytes(runs),
        text="" if agreement is None else str(agreement),
        note=note,
    )


def _draft_share(runs: Sequence[Run]) -> float | None:
    shares = [
        run.draft_seconds / run.step_seconds
        for run in runs
        if run.draft_seconds is not None and run.step_seconds is not None and run.step_seconds > 0
    ]
    return median(shares) if shares else None


def _gap_share(runs: Sequence[Run]) -> float | None:
    shares = [run.gap_share for run in runs if run.gap_share is not None]
    return median(shares) if shares else None


def _link_bytes(runs: Sequence[Run]) -> float | None:
    shares = [run.link_bytes / run.context_tokens for run in runs if run.link_bytes and run.context_tokens]
    return median(shares) if shares else None
