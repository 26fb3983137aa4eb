"""Tokens that two ranks take in their parts of the vocabulary are those that one takes from all of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.verifier_service.gpu_path.shard_ranks import run
from tests.verifier_service.gpu_path.tiny import OVERRIDES
from tests.verifier_service.model import tiny_targets

ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    target = tmp_path_factory.mktemp("target")
    tiny_targets.build("qwen3", target, **{**OVERRIDES["qwen3"], **ONE_LAYER}, vocab_size=251)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return run(target, tmp_path_factory.mktemp("room"))


def test_rows_of_all_kinds_get_the_whole_vocabularys_tokens_on_every_rank(found):
    for rank in found.values():
        assert rank["rows"]["tokens"] == rank["rows"]["want"]
    assert found["rank 0"]["rows"]["tokens"][-1] == -1, "logits that are not finite"


def test_logits_are_gathered_for_a_top_k_beyond_the_candidates_but_not_for_rows_that_these_leave_open(found):
    assert [rank["rows"]["gathers"] for rank in found.values()] == [1, 1]


@pytest.mark.parametrize("how", ["one", "ahead", "late", "torch", "mixed"])
def test_text_is_that_of_one_rank_whose_steps_wait_for_each_other(how, found):
    texts, alone = found["rank 0"][how]["texts"], found["rank 0"]["alone"]["texts"]
    assert texts == {kind: alone[kind] for kind in texts}


def test_no_logits_are_gathered_in_plain_and_sampled_steps_that_are_launched_ahead(found):
    assert [rank["ahead"]["gathers"] for rank in found.values()] == [[], []]
    assert found["rank 0"]["ahead"]["ahead"] > 0


def test_rows_that_the_host_works_on_have_their_logits_gathered_and_no_others(found):
    """Three of the four requests of `late`; of `mixed` one, with drafts, not the one that its candidates leave open."""
    for rank in found.values():
        assert set(rank["late"]["gathers"]) <= {1, 2, 3}
        assert max(rank["late"]["gathers"]) == 3
        assert len(rank["mixed"]["gathers"]) > 0
    assert found["rank 0"]["mixed"]["accepted"] > 0


@pytest.mark.parametrize("how", ["one", "late", "torch"])
def test_steps_are_launched_ahead_beside_requests_that_the_host_works_on(how, found):
    said = found["rank 0"][how]
    assert said["steps"] - said["ahead"] <= 2, "the first, and one more if a grammar takes its time"
    assert said["told"] == found["rank 0"]["alone"]["told"]
