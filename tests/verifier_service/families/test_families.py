"""Every family of the field, in its published layout, over one, two and four ranks: exact, and divided as it should."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from tests.verifier_service.families import ranks
from tests.verifier_service.families.ranks import Job, Outcome
from tests.verifier_service.families.rows import ROWS
from tests.verifier_service.families.schedule import asks, prompts
from tests.verifier_service.families.verdict import CLOSE, Judge, Verdict, texts
from verifier_service.model import touchpoints

SEEDS = {1: (0, 4), 2: (3,), 4: (6,)}  # by ranks; few blocks and small steps among them
CASES = [(name, size) for name, row in ROWS.items() for size in row.sizes]
SOCKETS = "qwen3_moe"  # its ranks talk as those on two hosts do
PATIENCE_S = 240.0

Proof = tuple[Job, list[Outcome], Verdict]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, int], list[Proof]]:
    """All rows' schedules, once."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("families")
    jobs: list[Job] = []
    judges: dict[str, Judge] = {}
    for name, row in ROWS.items():
        model = row.build(root / name)
        judges[name] = Judge(model)
        said = texts(model, prompts(seed=1))
        jobs += [
            Job(name, root / name, said, seed, size, sockets=name == SOCKETS)
            for size in row.sizes
            for seed in SEEDS[size]
        ]
    processes = ranks.start([job for job in jobs if job.size > 1], root)
    done: dict[str, list[Outcome]] = {job.name: [ranks.run(job)] for job in jobs if job.size == 1}
    ranks.join(processes, PATIENCE_S)
    done |= {job.name: ranks.outcomes(job, root) for job in jobs if job.size > 1}
    found: dict[tuple[str, int], list[Proof]] = {}
    for job in jobs:
        verdict = judges[job.row].verdict(job.texts, job.seed, done[job.name][0])
        found.setdefault((job.row, job.size), []).append((job, done[job.name], verdict))
    return found


@pytest.mark.parametrize(("name", "size"), CASES)
def test_greedy_output_is_transformers_generates(name, size, proofs):
    for _, _, verdict in proofs[name, size]:
        assert verdict.wrong == ""
        assert verdict.tokens > 50
        assert verdict.ties <= 2


@pytest.mark.parametrize(("name", "size"), CASES)
def test_logits_and_taps_are_the_stock_forwards(name, size, proofs):
    for _, _, verdict in proofs[name, size]:
        assert verdict.logits < CLOSE
        assert verdict.taps < CLOSE


@pytest.mark.parametrize(("name", "size"), CASES)
def test_each_rank_reads_its_share_of_what_can_be_divided(name, size, proofs):
    job, outcomes, _ = proofs[name, size][0]
    shapes = touchpoints.text_shapes(ranks.target_config(job))
    for rank, outcome in enumerate(outcomes):
        share = sum(ROWS[name].share(tensor, shape, rank, size) for tensor, shape in shapes.items())
        assert outcome.weight_bytes == 4 * share


@pytest.mark.parametrize(("name", "size"), CASES)
def test_kv_bytes_per_token_are_what_the_formula_says(name, size, proofs):
    for outcome in proofs[name, size][0][1]:
        assert outcome.kv_bytes_per_token == 4 * ROWS[name].kv_values(size)


@pytest.mark.parametrize(("name", "size"), [case for case in CASES if case[1] > 1])
def test_only_rank_zero_gets_logits_and_taps(name, size, proofs):
    for _, outcomes, _ in proofs[name, size]:
        assert [outcome.spoke for outcome in outcomes] == [True, *(False,) * (size - 1)]


def test_the_schedules_preempt_abort_resume_and_reject(proofs):
    for (name, size), found in proofs.items():
        counters = [outcomes[0].counters for _, outcomes, _ in found]
        assert sum(c["preemptions"] for c in counters) > 0, (name, size)
        for one in counters:
            assert one["accepted_tokens"] > 20
            assert one["drafted_tokens"] > one["accepted_tokens"] + 5
        asked = [ask for job, _, _ in found for ask in asks(job.texts, job.seed)]
        assert any(ask.aborts_at is not None and ask.resumes for ask in asked)
        assert any(ask.stops for ask in asked)
