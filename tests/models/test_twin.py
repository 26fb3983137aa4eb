"""A dense stand-in of the tiny target, for peers that cannot serve it."""

from __future__ import annotations

from pathlib import Path

from modeling.dflash_config import DFlashConfig
from modeling.target_config import read_target_config
from models.build.twin import parameters, write_twin

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"


def test_a_twin_has_as_many_parameters_and_fits_the_same_drafter(tmp_path):
    count = write_twin(TINY / "target", tmp_path)
    given, twin = read_target_config(TINY / "target"), read_target_config(tmp_path)
    drafter = DFlashConfig.load(TINY / "drafter")
    assert twin.model_type == "qwen3"
    assert abs(count / parameters(given) - 1) < 0.01
    assert parameters(twin) == count
    assert (twin.hidden, twin.layers, twin.vocabulary) == (drafter.hidden, given.layers, drafter.vocabulary)
    assert (tmp_path / "tokenizer.json").read_bytes() == (TINY / "target" / "tokenizer.json").read_bytes()
