import pytest
import torch
from transformers import DeepseekV3Config, Qwen3_5TextConfig, Qwen3Config

from paceline.bench import continuous
from paceline.bench.continuous import ContinuousBatching
from paceline.bench.errors import BenchError
from paceline.bench.published import PublishedLoop, commits, why_not
from paceline.bench.reference import Reference, load_reference, up_to_stop

PROMPTS = [(100, 101, 102), (40, 41, 42, 43, 44, 45, 46), (9,)]


@pytest.fixture(scope="module")
def reference(pair) -> Reference:
    return load_reference(pair[0], "float32", "cpu", threads=1, temperature=0.0)


@torch.inference_mode()
def greedy(model, prompt, count):
    """Token by token, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_padded_batches_give_each_prompt_its_own_greedy_text(reference):
    run = reference.run(PROMPTS, concurrency=3, max_tokens=12)
    expected = [up_to_stop(greedy(reference.model, prompt, 12), reference.stop_token_ids) for prompt in PROMPTS]
    assert list(run.texts) == expected
    assert run.tokens == sum(map(len, expected))
    assert run.seconds > 0


def test_gaps_are_zero_along_the_greedy_text_and_positive_off_it(reference):
    text = greedy(reference.model, PROMPTS[0], 6)
    assert max(reference.gaps(PROMPTS[0], text)) == 0
    wrong = (*text[:3], (text[3] + 1) % 256, *text[4:])
    gaps = reference.gaps(PROMPTS[0], wrong)
    assert gaps[:3] == [0, 0, 0]
    assert gaps[3] > 0


def test_a_text_ends_with_its_first_stop_token():
    assert up_to_stop([5, 7, 2, 0, 2], frozenset([2])) == (5, 7, 2)
    assert up_to_stop([5, 7], frozenset([2])) == (5, 7)


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(BenchError, match=r"holds no config\.json"):
        load_reference(tmp_path, "float32", "cpu", 1, 0.0)


def test_the_published_loop_gives_the_references_text_and_its_steps_add_up(reference, pair):
    pytest.importorskip("dflash")
    loop = PublishedLoop(reference, pair[1], "float32", "cpu", 0.0)
    made = loop.run(PROMPTS, concurrency=1, max_tokens=16)
    assert made.texts == reference.run(PROMPTS, concurrency=1, max_tokens=16).texts
    for output in made.outputs:
        assert sum(output.commits) == len(output.token_ids) - 1
        assert all(1 <= committed <= 4 for committed in output.commits)


def test_steps_are_read_from_where_they_start():
    assert commits([0, 5, 8, 9], prompt_tokens=5, generated=7) == (3, 1, 2)
    assert commits([0], prompt_tokens=5, generated=1) == ()


def test_targets_with_recurrent_state_have_no_published_loop():
    assert "qwen3_5_moe_text" in (why_not("qwen3_5_moe_text") or "")


def test_continuous_batching_gives_the_references_text_at_any_concurrency(reference):
    expected = reference.run(PROMPTS, concurrency=3, max_tokens=12).texts
    row = ContinuousBatching(reference, 0.0)
    for concurrency in (1, 3):
        assert row.run(PROMPTS, concurrency, max_tokens=12).texts == expected
    assert reference.run(PROMPTS, concurrency=3, max_tokens=12).texts == expected  # the shared model is as it was


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3_5TextConfig(num_hidden_layers=4), "this target has linear_attention layers"),
        (DeepseekV3Config(num_hidden_layers=1), "this target has latent attention"),
        (Qwen3Config(num_hidden_layers=1), None),
    ],
)
def test_continuous_batching_is_left_out_for_targets_that_it_cannot_serve(config, reason):
    found = continuous.why_not(config)
    assert (found or "").endswith(reason or "")
    assert (found is None) == (reason is None)
