"""The runner of one rank against transformers' stock forward, over random schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modeling.errors import CheckpointError
from modeling.weights import LoadProgress
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.model.schedules import (
    BLOCK_TOKENS,
    BLOCKS,
    SLOTS,
    Reference,
    reference,
    schedule,
    sequences,
    worst_difference,
)
from verifier_service.model.runner import TargetRunner
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

FAMILIES = tuple(tiny_targets.CONFIGS)
TAPS = (1, 0)  # in this order; the last layer has a test of its own


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]], Reference]]:
    torch.set_num_threads(1)
    texts = sequences(5, tiny_targets.VOCABULARY, seed=2)
    built = {}
    for family in FAMILIES:
        directory = tmp_path_factory.mktemp(family)
        built[family] = (directory, texts, reference(tiny_targets.build(family, directory), texts))
    return built


def make_runner(directory: Path, **overrides: object) -> TargetRunner:
    settings: dict = {
        "num_blocks": BLOCKS,
        "block_tokens": BLOCK_TOKENS,
        "num_slots": SLOTS,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return TargetRunner(directory, **{**settings, **overrides})


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_have_the_stock_forwards_logits_and_taps(family, targets):
    directory, texts, expected = targets[family]
    runner = make_runner(directory, taps=TAPS)
    steps = schedule(texts, tiny_targets.VOCABULARY, seed=0)
    logits, taps = worst_difference([runner.forward(step.plan) for step in steps], steps, expected, TAPS)
    assert logits < 1e-4
    assert taps < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3_5_moe"])
def test_plain_decoding_has_the_stock_forwards_logits(family, targets):
    directory, texts, expected = targets[family]
    runner = make_runner(directory)
    steps = schedule(texts, tiny_targets.VOCABULARY, seed=7, longest_block=1)
    outputs = [runner.forward(step.plan) for step in steps]
    assert worst_difference(outputs, steps, expected, ())[0] < 1e-4
    assert all(output.taps is None for output in outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_have_the_stock_forwards_logits(family, targets, monkeypatch):
    monkeypatch.setattr("modeling.fixed_linear.PACKED_FROM", {})  # as the large weights of a real target are
    directory, texts, expected = targets[family]
    runner = make_runner(directory)
    steps = schedule(texts, tiny_targets.VOCABULARY, seed=9)
    assert worst_difference([runner.forward(step.plan) for step in steps], steps, expected, ())[0] < 1e-4


def test_the_last_layers_tap_is_taken_before_the_final_norm(targets):
    directory, texts, _ = targets["qwen3_5_moe"]
    runner = make_runner(directory, taps=(3,))
    output = runner.forward(_prompt(texts[0][:9]))
    assert output.taps is not None
    assert output.logits is not None
    normed = runner._model.norm(output.taps[-1:])
    assert torch.allclose(runner._model.head(normed), output.logits, atol=1e-5)


def test_rejected_tokens_leave_no_trace_in_a_recurrent_state(targets):
    directory, texts, _ = targets["qwen3_5"]
    text = texts[0]
    plain, drafted = make_runner(directory), make_runner(directory)
    for runner in (plain, drafted):
        runner.forward(_prompt(text[:8]))
    plain.forward(StepPlan(1, verify=(VerifyRow(0, 8, tuple(text[8:10])),)))
    drafted.forward(StepPlan(1, verify=(VerifyRow(0, 8, (*text[8:10], 1, 2, 3)),)))
    last = StepPlan(2, decided=((0, 2),), verify=(VerifyRow(0, 10, (text[10],)),))
    want, got = plain.forward(last).logits, drafted.forward(last).logits
    assert want is not None
    assert got is not None
    assert torch.allclose(got, want, atol=1e-5)


def test_a_position_that_contradicts_the_recurrent_state_is_refused(targets):
    runner = make_runner(targets["qwen3_5"][0])
    runner.forward(_prompt(list(range(8))))
    with pytest.raises(RuntimeError, match="holds the state of 8 tokens"):
        runner.forward(StepPlan(1, verify=(VerifyRow(0, 7, (1,)),)))


def test_tokens_beyond_a_slots_blocks_are_refused(targets):
    runner = make_runner(targets["llama"][0])
    with pytest.raises(RuntimeError, match="owns 1 blocks of 4 tokens"):
        runner.forward(StepPlan(0, new_blocks=((0, 5),), prefill=(PrefillChunk(0, 0, (1, 2, 3, 4, 5), True),)))


def test_a_heartbeat_computes_nothing(targets):
    output = make_runner(targets["llama"][0]).forward(StepPlan(0, heartbeat=True))
    assert output.logits is not None
    assert output.logits.shape == (0, tiny_targets.VOCABULARY)


def test_a_chunk_that_does_not_complete_a_prompt_costs_no_logits(targets):
    runner = make_runner(targets["llama"][0])
    plan = StepPlan(0, new_blocks=((0, 0),), prefill=(PrefillChunk(0, 0, (1, 2, 3), False),))
    output = runner.forward(plan)
    assert output.logits is not None
    assert output.logits.shape == (0, tiny_targets.VOCABULARY)


def test_taps_of_layers_that_do_not_exist_are_refused(targets):
    with pytest.raises(ValueError, match=r"tap layers \[4\] do not exist: the target has layers 0\.\.3"):
        make_runner(targets["qwen3_5"][0], taps=(1, 4))


def test_a_missing_weight_is_named(targets, tmp_path):
    tiny_targets.build("qwen3", tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    for shard in sorted(tmp_path.glob("*.safetensors"))[1:]:
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"no lm_head\.weight although config\.json does not tie it"):
        make_runner(tmp_path)


def test_a_long_prompts_attention_in_pieces_equals_the_whole(targets, monkeypatch):
    monkeypatch.setattr("verifier_service.model.step.PIECE", 7)
    monkeypatch.setattr("verifier_service.model.step.SCORES", 40)
    monkeypatch.setattr("verifier_service.model.step.LEAST_PIECE", 3)
    monkeypatch.setattr("verifier_service.model.step.KEPT_MASK", 60)  # some are kept, some made anew
    directory, texts, expected = targets["llama"]
    steps = schedule(texts, tiny_targets.VOCABULARY, seed=5)
    runner = make_runner(directory)
    assert worst_difference([runner.forward(step.plan) for step in steps], steps, expected, ())[0] < 1e-4


def test_a_sliding_window_hides_what_the_stock_model_hides(targets, tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "layer_types": None}
    model = tiny_targets.build("qwen3", tmp_path, **window)
    texts = targets["qwen3"][1][:2]
    steps = schedule(texts, tiny_targets.VOCABULARY, seed=6)
    runner = make_runner(tmp_path)
    outputs = [runner.forward(step.plan) for step in steps]
    assert worst_difference(outputs, steps, reference(model, texts), ())[0] < 1e-4
    assert worst_difference(outputs, steps, targets["qwen3"][2], ())[0] > 1e-2  # the window matters here


def test_loading_reports_its_progress_and_bytes(targets):
    seen: list[LoadProgress] = []
    runner = make_runner(targets["qwen3_5_moe"][0], progress=seen.append)
    counts = [progress.tensors for progress in seen]
    assert counts == sorted(counts)
    assert counts[-1] == seen[0].total
    assert seen[-1].bytes == runner.weight_bytes


def _prompt(tokens: list[int]) -> StepPlan:
    blocks = -(-len(tokens) // BLOCK_TOKENS) + 3
    return StepPlan(
        0,
        new_blocks=tuple((0, block) for block in range(blocks)),
        prefill=(PrefillChunk(0, 0, tuple(tokens), True),),
    )
