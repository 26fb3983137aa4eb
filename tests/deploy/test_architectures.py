"""The shipped configurations: as large as their models are called, in pairs that fit, and checked at start."""

from __future__ import annotations

import json
import math
import re

import pytest

from cluster.errors import ConfigError
from deploy.architecture import SHIPPED, shipped, shipped_names
from deploy.checks import checked
from deploy.config import Application
from modeling.dflash_config import DFlashConfig
from modeling.families import shard_map
from modeling.footprint import active_parameters, held_parts, routed_experts, storage_of
from modeling.target_config import read_target_config
from verifier_service.model.touchpoints import text_shapes

TARGETS = [name for name in shipped_names() if not name.endswith("-dflash")]
SIZES = re.compile(r"-(?P<total>\d+)b(-a(?P<active>\d+)b)?")
CALLED = {  # billions, where a name does not say so: (total, active)
    "kimi-k2.5": ("1000", "32"),
    "qwen3-coder-next": ("80", "3"),
    "gpt-oss-20b": ("21", "4"),
    "gpt-oss-120b": ("117", "5"),
}


def billions_called(name: str) -> tuple[str, str | None]:
    if name in CALLED:
        return CALLED[name]
    found = SIZES.search(name)
    assert found is not None
    return found["total"], found["active"]


def agrees(parameters: int, called: str) -> bool:
    """Within 3% of a number that is written as `called`."""
    billions, written = parameters / 1e9, float(called)
    unit = 10.0 if called.endswith("000") else 1.0
    return (written - unit / 2) * 0.97 <= billions <= (written + unit / 2) * 1.03


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_has_as_many_parameters_as_its_name_says(name):
    config = read_target_config(shipped("verifier.architecture", name))
    shapes = text_shapes(config)
    parts = held_parts(shapes, shard_map(config, 1), 1, storage_of(None, 2))
    total, active = billions_called(name)
    assert sum(part.parameters for part in parts) == sum(math.prod(shape) for shape in shapes.values())
    assert agrees(sum(part.parameters for part in parts), total)
    if active is not None:
        # Names differ in what they count: gpt-oss leaves the embedding out, Qwen3-Coder-Next the head too.
        counted = active_parameters(parts, routed_experts(config))
        lookup, head = ({part.name: part.parameters for part in parts}[name] for name in ("embedding", "head"))
        assert any(agrees(count, active) for count in (counted, counted - lookup, counted - lookup - head))


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.endswith("-dflash")])
def test_a_drafter_fits_its_target(name):
    drafter = DFlashConfig.load(shipped("drafter.architecture", name))
    target = read_target_config(shipped("verifier.architecture", name.removesuffix("-dflash")))
    assert (drafter.hidden, drafter.vocabulary) == (target.hidden, target.vocabulary)
    assert drafter.num_target_layers == target.layers
    assert drafter.mask_token_id < target.vocabulary


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_configuration_says_where_it_is_from(name):
    raw = json.loads((SHIPPED / f"{name}.json").read_text())
    assert raw["_source"]
    assert all(isinstance(assumption, str) for assumption in raw.get("_assumed", []))


def test_an_unknown_architecture_is_answered_with_close_ones():
    with pytest.raises(ConfigError, match=r"verifier.architecture is 'qwen3-9b'.*did you mean .*qwen3-8b"):
        shipped("verifier.architecture", "qwen3-9b")


def test_a_checkpoint_of_another_size_than_its_architecture_stops_the_start(arguments):
    arguments["verifier"]["architecture"] = "qwen3-8b"
    with pytest.raises(ConfigError, match=r"hidden_size is 32, not 4096"):
        checked(Application.model_validate(arguments))


def test_a_drafter_of_another_size_than_its_architecture_stops_the_start(arguments):
    arguments["drafter"]["architecture"] = "qwen3-8b-dflash"
    with pytest.raises(ConfigError, match=r"drafter.architecture is 'qwen3-8b-dflash', but drafter.checkpoint"):
        checked(Application.model_validate(arguments))


def test_a_checkpoint_that_agrees_with_its_architecture_is_accepted(arguments, change):
    change("target", **json.loads(shipped("", "qwen3-8b").read_text()))
    change("drafter", **json.loads(shipped("", "qwen3-8b-dflash").read_text()))
    arguments["verifier"]["architecture"] = "qwen3-8b"
    arguments["drafter"]["architecture"] = "qwen3-8b-dflash"
    checked(Application.model_validate(arguments))


def test_a_tied_head_is_no_tensor_of_its_own():
    tied, untied = (text_shapes(read_target_config(shipped("", name))) for name in ("qwen3-4b", "qwen3-8b"))
    assert tied["layers.35.self_attn.k_proj.weight"] == (1024, 2560)
    assert "lm_head.weight" not in tied
    assert untied["lm_head.weight"] == (151936, 4096)
