"""Tables as files: what is read, what is refused and how it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from verifier_service.step_tables.prior import read_prior
from verifier_service.step_tables.tables import read_draft_table, read_verify_table

STEP = {"requests": 1, "rows": 1, "context": 64, "seconds": 0.01, "host_seconds": 0.001, "stock_seconds": None}
VERIFY = {
    "format": 1,
    "shape": "tiny",
    "device": "a CPU",
    "torch": "2.13",
    "layers": 4,
    "verify": [STEP, {**STEP, "requests": 4, "seconds": 0.013}, {**STEP, "rows": 8, "seconds": 0.017}],
}
DRAFT = {
    "format": 1,
    "shape": "tiny-dflash",
    "block_size": 8,
    "draft": [
        {"contexts": 1, "rows": 8, "window": 64, "seconds": 0.002, "inject_seconds": 0.001},
        {"contexts": 4, "rows": 8, "window": 64, "seconds": 0.004, "inject_seconds": 0.002},
    ],
}


def written(folder: Path, content: object) -> Path:
    path = folder / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_step_is_priced_between_those_that_were_measured(tmp_path):
    table = read_verify_table(written(tmp_path, VERIFY))
    assert table.title == "tiny on a CPU"
    assert table.step_s(1, 1, 64) == 0.01
    assert table.step_s(2, 1, 64) == pytest.approx(0.011)
    assert table.step_s(1, 4.5, 64) == pytest.approx(0.0135)


def test_prefill_is_priced_by_what_a_token_costs_in_the_largest_step(tmp_path):
    table = read_verify_table(written(tmp_path, VERIFY))
    assert table.token_s(64) == pytest.approx((table.step_s(4, 8, 64) - 0.01) / 31)


def test_a_draft_takes_what_was_committed_in_first(tmp_path):
    table = read_draft_table(written(tmp_path, DRAFT))
    assert table.draft_s(1, 8, 64) == pytest.approx(0.003)
    assert table.draft_s(2.5, 2, 9999) == pytest.approx(0.0045)


def test_a_table_of_the_other_kind_is_named_as_such(tmp_path):
    with pytest.raises(ConfigError, match=r"table.json holds 'draft' and no 'verify': it is the other kind"):
        read_verify_table(written(tmp_path, DRAFT))
    with pytest.raises(ConfigError, match="holds 'verify' and no 'draft'"):
        read_draft_table(written(tmp_path, VERIFY))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**VERIFY, "format": 2}, r"table\.json: format is 2: Input should be 1"),
        ({**VERIFY, "verify": []}, r"verify is \[\]"),
        ({**VERIFY, "verify": [{**STEP, "seconds": -1.0}]}, r"verify\.0\.seconds is -1\.0: Input should be greater"),
        ({**VERIFY, "verify": [STEP, {**STEP, "rows": "x"}]}, r"verify\.1\.rows is 'x'"),
        ({key: VERIFY[key] for key in VERIFY if key != "layers"}, r"layers: Field required"),
        (
            {**VERIFY, "verify": [{**STEP, "requests": 4}, {**STEP, "rows": 8}]},
            r"verify lacks the smallest step of all, requests 1, rows 1, context 64",
        ),
        ("{", r"table\.json is not JSON"),
        ("[" * 100_000, r"table\.json is not JSON"),
        ({**VERIFY, "verify": [STEP, {**STEP, "requests": 10**400}]}, r"verify\.1\.requests is 10+: Input should"),
        ({**VERIFY, "verify": [{**STEP, "seconds": 1e308}]}, r"verify\.0\.seconds is 1e\+308: Input should be less"),
        (
            {**VERIFY, "verify": [dict.fromkeys(STEP, at) for at in range(1, 41)]},
            r"verify has so many different values of requests, rows, context that they span 64000 steps",
        ),
        ([], r"must hold an object with the key 'verify'"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_with_its_cure(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_verify_table(written(tmp_path, content))
    assert "measure" in str(error.value) or "README" in str(error.value)


def test_a_table_that_is_not_there_names_what_would_write_it(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file.*measure_steps"):
        read_verify_table(tmp_path / "none.json")


def test_a_prior_scales_a_table_of_some_of_the_layers_to_all_of_them(tmp_path):
    step_table = written(tmp_path, {**VERIFY, "layers": 2})
    prior = read_prior(str(step_table), None, layers=4)
    assert prior is not None
    assert prior.plain(4) == pytest.approx(2 * 0.013)
    assert prior.extra(1, 7) == pytest.approx(2 * 0.007)
    assert prior.wait(1) is None
    assert read_prior(None, None, layers=4) is None


def test_a_prior_knows_the_wait_for_whole_blocks_where_drafts_were_measured(tmp_path):
    (tmp_path / "draft.json").write_text(json.dumps(DRAFT))
    prior = read_prior(str(written(tmp_path, VERIFY)), str(tmp_path / "draft.json"), layers=4)
    assert prior is not None
    assert prior.wait(4) == pytest.approx(0.006)
