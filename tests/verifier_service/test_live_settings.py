"""Serve's user_config is checked before the engine hears of it."""

from __future__ import annotations

import pytest

from cluster.contracts import Configure
from verifier_service.live_settings import live_settings


@pytest.mark.parametrize(
    ("key", "value", "limits"),
    [
        ("soft_deadline_s", 0, "> 0, <= 10"),
        ("soft_deadline_s", 11, "> 0, <= 10"),
        ("soft_deadline_s", float("nan"), "> 0, <= 10"),
        ("max_draft_tokens", -1, ">= 0"),
        ("max_draft_tokens", "many", ">= 0"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_key_value_and_limits(key, value, limits):
    with pytest.raises(ValueError) as raised:
        live_settings({key: value})
    for part in (key, repr(value), limits):
        assert part in str(raised.value)


def test_unknown_keys_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"\['mode'\].*max_draft_tokens"):
        live_settings({"mode": "none"})


def test_what_is_not_given_stays_as_it_is():
    assert live_settings({}) == Configure()
    assert live_settings({"max_draft_tokens": 0, "soft_deadline_s": None}) == Configure(max_draft_tokens=0)
