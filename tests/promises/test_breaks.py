"""The list of breaks fits the code; the long suite breaks each promise and sees its tests fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.promises.breaks import BREAKS, PROMISES, Break
from tests.promises.run import ROOT, copy_of_tree, unnoticed


def test_every_promise_is_broken_and_no_two_breaks_share_a_name():
    assert {each.promise for each in BREAKS} == set(PROMISES)
    assert len({each.name for each in BREAKS}) == len(BREAKS)


@pytest.mark.parametrize("each", BREAKS, ids=lambda each: each.name)
def test_a_break_names_one_place_in_the_code_and_tests_that_exist(each: Break):
    assert (ROOT / each.file).read_text().count(each.sound) == 1, f"{each.sound!r} in {each.file}"
    assert each.tests
    for test in each.tests:
        file, _, name = test.partition("::")
        assert not name or re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), test


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_tree(tmp_path_factory.mktemp("tree"))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("each", BREAKS, ids=lambda each: each.name)
def test_a_broken_promise_is_noticed(each: Break, tree: Path):
    assert unnoticed(each, tree) == []
