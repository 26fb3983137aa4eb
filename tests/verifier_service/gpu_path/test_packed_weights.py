"""Targets with packed weights say over kernels what the stock model with the dequantized ones says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.quantized.packed import BlockPacked
from tests.verifier_service.gpu_path.tiny import LONGEST_ROW, OVERRIDES, VOCABULARY, TinyTarget
from tests.verifier_service.model.packed_targets import TARGETS
from tests.verifier_service.model.schedules import reference, schedule, sequences

pytestmark = [pytest.mark.filterwarnings(f"ignore:{what} encountered") for what in ("overflow", "invalid value")]


@pytest.mark.parametrize("name", ["fp8 qwen3", "mxfp4 gpt_oss", "nvfp4 of modelopt qwen3_5_moe"])
def test_packed_weights_are_multiplied_and_never_unpacked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = TARGETS[name]
    model = replace(target, overrides=OVERRIDES[target.family]).build(tmp_path)
    texts = [text[:9] for text in sequences(1, VOCABULARY, seed=2)]
    tiny = TinyTarget(tmp_path, schedule(texts, VOCABULARY, 2, longest_block=LONGEST_ROW), reference(model, texts))
    runner = tiny.runner()

    def dequantize(self: BlockPacked, dtype: torch.dtype) -> torch.Tensor:
        raise AssertionError("a packed weight was dequantized as a whole")

    monkeypatch.setattr(BlockPacked, "dequantize", dequantize)
    logits, _ = tiny.worst(runner)
    assert logits < 1e-4
