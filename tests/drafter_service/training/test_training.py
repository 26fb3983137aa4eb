"""The trainer: data, blocks, objective, resuming; on a tiny random Qwen3 target, for real."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafter_service.model import PADDING, DFlashModel
from drafter_service.training import sequences
from drafter_service.training.curves import draw
from drafter_service.training.objective import Blocks, block_hidden, block_loss, sample_blocks, teacher_rows
from drafter_service.training.sequences import TrainingSequence, cut_cycle
from drafter_service.training.target import TrainingTarget
from drafter_service.training.trainer import DraftShape, Recipe, Trainer, learning_rate, new_config
from tests.drafter_service.pairs import draft_config, second

VOCABULARY = 64
RECIPE = Recipe(
    steps=12, batch=4, anchors=6, max_length=64, learning_rate=3e-3, hold_out=4, evaluate_every=4, warm_up=0.1
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TrainingTarget:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, mask_token="w2").save_pretrained(directory)
    return TrainingTarget(directory, torch.float32, "cpu")


SHAPE = DraftShape(layers=2, block_size=4, taps=(0, 2), mask_token_id=2)


def counting_sequences(count: int) -> list[TrainingSequence]:
    """Sequences that count upwards: a drafter can learn them in a few steps."""
    return [TrainingSequence(tuple(3 + (start + i) % 60 for i in range(40)), 4) for start in range(count)]


def test_taps_are_the_outputs_of_the_named_layers(target: TrainingTarget) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    states = target.model(ids, output_hidden_states=True).hidden_states
    taps = target.taps(ids, (0, 1))
    assert torch.allclose(taps, torch.cat([states[1], states[2]], -1), atol=1e-6)


def test_a_block_sees_only_the_context_before_its_anchor_and_itself(target: TrainingTarget) -> None:
    model = DFlashModel(new_config(target, SHAPE))
    ids, lengths = torch.arange(3, 23)[None], torch.tensor([20])
    taps = torch.randn(1, 20, 64)
    together = block_hidden(model, target.embedding, taps, ids, lengths, torch.tensor([[6, 12]]))
    changed = taps.clone()
    changed[:, 6:] += 1
    alone = block_hidden(model, target.embedding, changed, ids, lengths, torch.tensor([[6]]))
    assert torch.allclose(together[:, 0], alone[:, 0], atol=1e-5)
    assert not torch.allclose(
        together[:, 1],
        block_hidden(model, target.embedding, changed, ids, lengths, torch.tensor([[12]]))[:, 0],
        atol=1e-3,
    )


def test_right_padding_does_not_reach_a_block(target: TrainingTarget) -> None:
    model = DFlashModel(new_config(target, SHAPE))
    ids, taps = torch.arange(3, 13)[None], torch.randn(1, 10, 64)
    padded_ids, padded_taps = torch.cat([ids, ids], 1), torch.cat([taps, torch.randn(1, 10, 64)], 1)
    anchors, lengths = torch.tensor([[8]]), torch.tensor([10])
    short = block_hidden(model, target.embedding, taps, ids, lengths, anchors)
    long = block_hidden(model, target.embedding, padded_taps, padded_ids, lengths, anchors)
    assert torch.allclose(short, long, atol=1e-5)
    assert PADDING > 1 << 32


def test_anchors_are_distinct_lie_in_the_answer_and_label_the_tokens_after_them() -> None:
    ids = torch.arange(100, 120)[None].repeat(2, 1)
    blocks = sample_blocks(ids, torch.tensor([20, 9]), torch.tensor([5, 7]), 6, 4, torch.Generator().manual_seed(0))
    assert len(set(blocks.anchors[0].tolist())) == 6
    for row, (start, length) in enumerate(((5, 20), (7, 9))):
        for anchor, labels, valid in zip(blocks.anchors[row], blocks.labels[row], blocks.valid[row]):
            if not valid.any():
                continue
            assert start - 1 <= anchor <= length - 2
            expected = [100 + int(anchor) + k for k in range(1, 4) if int(anchor) + k < length]
            assert labels[valid].tolist() == expected
    assert int(blocks.valid[1].any(1).sum()) == 2


def test_dpace_weighs_a_row_by_how_likely_it_is_reached() -> None:
    logits = torch.zeros(1, 1, 3, 4)
    logits[0, 0, 0, 1] = 50.0  # row 1 is certain and wrong: rows 2 and 3 are hardly reached
    labels = torch.zeros(1, 1, 3, dtype=torch.long)
    blocks = Blocks(torch.zeros(1, 1, dtype=torch.long), labels, torch.ones(1, 1, 3, dtype=torch.bool))
    dpace, tau = block_loss(logits, blocks, "dpace", gamma=4.0, alpha=0.5)
    decay, _ = block_loss(logits, blocks, "decay", gamma=4.0, alpha=0.5)
    assert dpace > decay
    assert tau == 1.0


def test_a_teacher_that_agrees_with_the_drafter_asks_for_nothing_more() -> None:
    scores = torch.tensor([[[[2.0, 1.0, 0.0, -1.0]]]], requires_grad=True)
    blocks = Blocks(torch.zeros(1, 1).long(), torch.zeros(1, 1, 1).long(), torch.ones(1, 1, 1).bool())
    same, _ = block_loss(scores, blocks, "dpace", 4.0, 0.5, teacher=scores.detach())
    hard, _ = block_loss(scores, blocks, "dpace", 4.0, 0.5)
    (toward_both,) = torch.autograd.grad(same, scores)
    (toward_label,) = torch.autograd.grad(hard, scores)
    assert torch.allclose(toward_both, 0.5 * toward_label, atol=1e-6)


def test_the_teacher_of_a_label_is_the_targets_state_one_place_before_it() -> None:
    final = torch.arange(12.0)[None, :, None].expand(1, 12, 2)
    blocks = Blocks(torch.tensor([[4]]), torch.zeros(1, 1, 3).long(), torch.ones(1, 1, 3).bool())
    assert teacher_rows(final, blocks)[0, 0, :, 0].tolist() == [4.0, 5.0, 6.0]


def test_an_unknown_loss_is_named() -> None:
    blocks = Blocks(torch.zeros(1, 1).long(), torch.zeros(1, 1, 3).long(), torch.ones(1, 1, 3).bool())
    with pytest.raises(ValueError, match="'mse' is unknown"):
        block_loss(torch.zeros(1, 1, 3, 4), blocks, "mse", 4.0, 0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_a_predictable_target_and_an_interrupted_run_ends_in_the_same_weights(
    target: TrainingTarget, tmp_path: Path, optimizer: str
) -> None:
    data, config = counting_sequences(40), new_config(target, SHAPE)
    recipe = replace(RECIPE, optimizer=optimizer, distill=optimizer == "muon", block_rows=3)
    whole = Trainer(target, config, recipe, tmp_path / "whole")
    whole.run(data, lambda *_: None)
    assert whole.curve[-1].held_out_loss < whole.curve[0].held_out_loss

    class Interrupted(Exception):
        pass

    def stop_after_nine(step: int, *_: float) -> None:
        if step == 9:
            raise Interrupted

    first = Trainer(target, config, recipe, tmp_path / "halves")
    with pytest.raises(Interrupted):
        first.run(data, stop_after_nine)
    second = Trainer(target, config, recipe, tmp_path / "halves")
    assert second.step == 8
    second.run(data, lambda *_: None)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name
    loaded = DFlashModel.load(tmp_path / "whole", torch.float32)
    assert torch.allclose(loaded.fc.weight, whole.model.fc.weight, atol=1e-2)
    draw(second.curve, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_another_configuration_does_not_resume_silently(target: TrainingTarget, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=4)
    Trainer(target, new_config(target, SHAPE), recipe, tmp_path).run(counting_sequences(12), lambda *_: None)
    with pytest.raises(ValueError, match="another draft model configuration"):
        Trainer(target, new_config(target, replace(SHAPE, layers=1)), recipe, tmp_path)


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    recipe = Recipe(steps=100, learning_rate=1.0, warm_up=0.1)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert max(rates) == rates[9] == 1.0
    assert rates[0] == 0.1
    assert rates[-1] < 0.01


def test_a_cycle_is_cut_where_its_third_round_is_complete() -> None:
    text = [9, 8, 7, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert cut_cycle(text, 0) == 12
    assert cut_cycle([1, 2, 3, 4, 5, 6], 0) == 6
    assert cut_cycle([5, 5, 5, 5], 2) == 4


def test_continuations_are_the_targets_own_and_end_at_the_stop_token(target: TrainingTarget) -> None:
    prompts = [sequences.Prompt((5, 6, 7)), sequences.Prompt((9, 9)), sequences.Prompt((8, 6, 7))]
    made = [s for group in target.continue_prompts(prompts, 8, 0.0, batch=2) for s in group]
    assert sorted(s.ids[: s.answer_start] for s in made) == sorted(p.ids for p in prompts)
    for sequence in made:
        prompt = torch.tensor([sequence.ids[: sequence.answer_start]])
        text = target.model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
        assert tuple(text[: len(sequence.ids)]) == sequence.ids


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "expected an object"),
        ("{}", "none of 'prompt'"),
        ('{"prompt": ""}', "empty"),
    ],
)
def test_a_bad_data_line_is_named(target: TrainingTarget, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(sequences.DataError, match=message):
        sequences.read(path, target.tokenizer)


def test_the_command_trains_from_prompts_and_says_what_is_wrong_with_its_options(
    target: TrainingTarget, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from paceline.train import app

    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"w{i} w{i + 1} w{i + 2}"}) + "\n" for i in range(3, 23)))
    common = ["drafter", "--target", str(target.directory), "--data", str(data), "--out", str(tmp_path / "out")]
    small = ["--layers", "1", "--block-size", "4", "--steps", "2", "--batch", "2", "--anchors", "3"]
    more = ["--evaluate-every", "1", "--new-tokens", "6", "--hold-out", "2", "--taps", "0,2"]
    result = CliRunner().invoke(app, [*common, *small, *more])
    assert result.exit_code == 0, result.output
    assert DFlashModel.load(tmp_path / "out", torch.float32).dflash.target_layer_ids == (0, 2)
    bad = CliRunner().invoke(app, [*common, *small, *more[:-1], "0,9"])
    assert bad.exit_code == 2
    assert "target_layer_ids" in bad.output
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.json").write_text(json.dumps(draft_config(**second())))
    refused = CliRunner().invoke(app, [*common, *more, "--init", str(tmp_path / "second")])
    assert refused.exit_code == 2
    assert "is a DFlash 2 drafter" in refused.output
