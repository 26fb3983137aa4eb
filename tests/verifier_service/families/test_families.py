"""Every family of the field, in its published layout, over one, two and four ranks: exact, and divided as it should."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from modeling.target_config import read_target_config
from tests.verifier_service.families.bits import merged, unsettled
from tests.verifier_service.families.campaign import Proof, prove, table, table_of_bits, wrongs
from tests.verifier_service.families.rows import ROWS
from tests.verifier_service.families.schedule import asks
from tests.verifier_service.families.verdict import CLOSE
from verifier_service.model import touchpoints

SEEDS = {1: (0, 4), 2: (3,), 4: (6,)}  # by ranks; few blocks and small steps among them; 3 and 4 run ahead
DETERMINISTIC_SEEDS = {1: (0, 4), 2: (3,), 4: (6,)}
CASES = [(name, size) for name, row in ROWS.items() for size in row.sizes]
PATIENCE_S = 280.0


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, int], list[Proof]]:
    """All rows' schedules, once; the deterministic ones under a size of 0."""
    found: dict[tuple[str, int], list[Proof]] = {}
    for proof in prove(tmp_path_factory.mktemp("families"), (1,), SEEDS, PATIENCE_S, DETERMINISTIC_SEEDS):
        found.setdefault((proof.job.row, 0 if proof.job.deterministic else proof.job.size), []).append(proof)
    return found


@pytest.mark.parametrize(("name", "size"), CASES)
def test_greedy_output_is_transformers_generates(name, size, proofs):
    for proof in proofs[name, size]:
        assert proof.verdict.wrong == ""
        assert proof.verdict.tokens > 50
        assert proof.verdict.ties <= 2


@pytest.mark.parametrize(("name", "size"), CASES)
def test_logits_and_taps_are_the_stock_forwards(name, size, proofs):
    for proof in proofs[name, size]:
        assert proof.verdict.logits < CLOSE
        assert proof.verdict.taps < CLOSE


@pytest.mark.parametrize(("name", "size"), CASES)
def test_each_rank_reads_its_share_of_what_can_be_divided(name, size, proofs):
    proof = proofs[name, size][0]
    shapes = touchpoints.text_shapes(read_target_config(proof.job.directory))
    for rank, outcome in enumerate(proof.outcomes):
        share = sum(ROWS[name].share(tensor, shape, rank, size) for tensor, shape in shapes.items())
        assert outcome.weight_bytes == 4 * share


@pytest.mark.parametrize(("name", "size"), CASES)
def test_kv_bytes_per_token_are_what_the_formula_says(name, size, proofs):
    for outcome in proofs[name, size][0].outcomes:
        assert outcome.kv_bytes_per_token == 4 * ROWS[name].kv_values(size)


@pytest.mark.parametrize(("name", "size"), [case for case in CASES if case[1] > 1])
def test_only_rank_zero_gets_logits_and_taps(name, size, proofs):
    for proof in proofs[name, size]:
        assert [outcome.spoke for outcome in proof.outcomes] == [True, *(False,) * (size - 1)]


def test_the_schedules_preempt_abort_resume_reject_and_find_prefixes(proofs):
    for case, found in proofs.items():
        counters = [proof.outcomes[0].counters for proof in found]
        asked = [ask for proof in found for ask in asks(proof.job.texts, proof.job.seed)]
        assert sum(c["preemptions"] for c in counters) > 0, case
        assert sum(c["prefix_hit_tokens"] for c in counters) > 0, case
        assert all(c["drafted_tokens"] > c["accepted_tokens"] + 5 > 25 for c in counters), case
        assert any(ask.aborts_at is not None and ask.resumes for ask in asked), case
        assert any(ask.stops for ask in asked), case
        assert all((proof.outcomes[0].counters["steps_ahead"] > 4) == proof.job.ahead for proof in found), case


@pytest.mark.parametrize("name", ROWS)
def test_in_deterministic_mode_a_tokens_bits_depend_on_neither_schedule_nor_ranks(name, proofs):
    assert wrongs(proofs[name, 0]) == []
    bits = merged(proof.bits for proof in proofs[name, 0])
    assert len(bits) > 100
    assert unsettled(bits) == 0


@pytest.mark.parametrize("name", ROWS)
def test_in_default_mode_they_do(name, proofs):
    assert unsettled(merged(proof.bits for proof in proofs[name, 1])) > 0


@pytest.mark.long
@pytest.mark.timeout(3700)
def test_every_family_stays_exact_over_many_schedules(tmp_path):
    seeds = range(20, 29)
    schedules = {1: seeds, 2: seeds, 4: seeds}
    proofs = prove(tmp_path, range(10, 14), schedules, timeout_s=3600, deterministic=schedules)
    print(table(proofs))
    print(table_of_bits(proofs))
    assert wrongs(proofs) == []
    for name in ROWS:
        steady = merged(proof.bits for proof in proofs if proof.job.deterministic and proof.job.row == name)
        assert unsettled(steady) == 0, name
