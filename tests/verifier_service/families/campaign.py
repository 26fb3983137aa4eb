"""All rows under many schedules, at every tensor-parallel degree, and the table of what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.verifier_service.families import ranks
from tests.verifier_service.families.bits import Bits, bits_of, merged, unsettled
from tests.verifier_service.families.ranks import Job, Outcome
from tests.verifier_service.families.rows import ROWS
from tests.verifier_service.families.schedule import prompts
from tests.verifier_service.families.verdict import CLOSE, TIE, Judge, Verdict, texts

AHEAD = (3, 4)  # of five schedules
SOCKETS = "qwen3_moe"  # its ranks talk as those on two hosts do


@dataclass(frozen=True)
class Proof:
    """One schedule: what each rank gave (without its rows of logits) and what that is worth."""

    job: Job
    outcomes: list[Outcome]
    verdict: Verdict
    bits: Bits


def prove(
    root: Path,
    text_seeds: Sequence[int],
    schedules: Mapping[int, Sequence[int]],
    timeout_s: float,
    deterministic: Mapping[int, Sequence[int]] | None = None,
) -> list[Proof]:
    """schedules: seeds by number of ranks, for each seed of texts; deterministic: likewise, in that mode.

    Raises TimeoutError if ranks take longer.
    """
    torch.set_num_threads(1)
    jobs: list[Job] = []
    judges: dict[str, Judge] = {}
    for name, row in ROWS.items():
        model = row.build(root / name)
        judges[name] = Judge(model)
        for text_seed in text_seeds:
            said = texts(model, prompts(text_seed))
            jobs += [
                Job(
                    name,
                    root / name,
                    text_seed,
                    said,
                    seed,
                    size,
                    sockets=name == SOCKETS,
                    deterministic=mode,
                    ahead=seed % 5 in AHEAD,
                )
                for mode, seeds in ((False, schedules), (True, deterministic or {}))
                for size in row.sizes
                for seed in seeds.get(size, ())
            ]

    def judged(job: Job, outcomes: list[Outcome]) -> Proof:
        verdict = judges[job.row].verdict(job.texts, job.seed, outcomes[0])
        bits = bits_of(job.texts, job.seed, outcomes[0])
        return Proof(job, [replace(outcome, rows={}) for outcome in outcomes], verdict, bits)

    processes = ranks.start([job for job in jobs if job.size > 1], root)
    proofs = [judged(job, [ranks.run(job)]) for job in jobs if job.size == 1]
    ranks.join(processes, timeout_s)
    return proofs + [judged(job, ranks.outcomes(job, root)) for job in jobs if job.size > 1]


def table(proofs: Sequence[Proof]) -> str:
    """Markdown, a line for each family and degree."""
    lines = [
        "| family | TP | schedules | exact | tokens | ties | logits | steps | preempted | from cache | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        for size in row.sizes:
            own = [proof for proof in proofs if (proof.job.row, proof.job.size) == (name, size)]
            own = [proof for proof in own if not proof.job.deterministic]
            lines.append(f"| {' | '.join([name, str(size), *_cells(own)])} |")
    return "\n".join(lines)


def _cells(proofs: Sequence[Proof]) -> list[str]:
    def counted(counter: str) -> str:
        return str(int(sum(proof.outcomes[0].counters[counter] for proof in proofs)))

    verdicts = [proof.verdict for proof in proofs]
    exact = sum(not verdict.wrong and verdict.logits < CLOSE for verdict in verdicts)
    return [
        str(len(proofs)),
        "all" if exact == len(proofs) else f"**{exact}**",
        str(sum(verdict.tokens for verdict in verdicts)),
        str(sum(verdict.ties for verdict in verdicts)),
        f"{max(verdict.logits for verdict in verdicts):.0e}",
        counted("steps"),
        counted("preemptions"),
        counted("prefix_hit_tokens"),
        f"{sum(proof.outcomes[0].seconds for proof in proofs):.0f}",
    ]


def table_of_bits(proofs: Sequence[Proof]) -> str:
    """Markdown, a line for each family: how many rows did not always have the same bits, in both modes."""
    lines = [
        "| family | TP | rows of the same context, compared | of them not always the same: default | deterministic |",
        "|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        cells = [", ".join(map(str, row.sizes))]
        for mode in (False, True):
            seen = merged(proof.bits for proof in proofs if (proof.job.row, proof.job.deterministic) == (name, mode))
            if not mode:
                cells.append(str(len(seen)))
            cells.append(str(unsettled(seen)))
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def wrongs(proofs: Sequence[Proof]) -> list[str]:
    """The contradictions, each with the schedule that shows it again."""
    return [
        f"{proof.job.name}: {proof.verdict.wrong or f'logits differ by {proof.verdict.logits:.1e}'}"
        for proof in proofs
        if proof.verdict.wrong or proof.verdict.logits >= CLOSE
    ]


EXPLANATION = f"""\
# Every family against transformers

`python -m tests.verifier_service.families` writes this page. For every family it builds a tiny target with random
weights and the family's features, in the layout that its checkpoints are published in, and runs the engine over it
under random schedules: several requests at once with little of their prompts in a step, drafts that are right up to a
random point and of a random number for each request and step (two of five schedules have stretches without drafts, in
which steps are launched before the one before is read), too few KV blocks, requests that are aborted and resume
from what they had, prompts that begin as others do.

*Exact*: every request's greedy text is that of transformers' `generate`, token for token, and the logits of every token
are those of its stock forward to within {CLOSE:.0e} in float32. *Ties*: tokens where the two best logits of the stock
model lie within {TIE:.0e} of each other and the engine took the other one; the rest of that text is compared with what
the stock model says after it. *Preempted*: how often a running request had to give up its blocks. *From cache*: prompt
tokens that were not computed again. *Seconds*: of all its schedules, on the machine that wrote the page, whatever else
it was doing; they are no measure of speed. The two-rank runs of {SOCKETS}
talk over sockets, the others through shared memory.
"""
