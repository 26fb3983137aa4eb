import json

import pytest

from cluster.errors import ConfigError
from deploy.checks import CHECKOUT, checked
from deploy.config import Application


def refusal(arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(Application.model_validate(arguments))
    return str(caught.value)


def test_a_fitting_pair_passes_with_absolute_paths(arguments, pair, monkeypatch):
    monkeypatch.chdir(pair)
    arguments["verifier"]["target"], arguments["drafter"]["checkpoint"] = "target", "drafter"
    app = checked(Application.model_validate(arguments))
    assert app.drafter is not None
    assert app.verifier.target == app.drafter.target == str(pair / "target")
    assert app.verifier.drafter == app.drafter.checkpoint == str(pair / "drafter")


def test_a_missing_directory_is_named_with_both_places_that_were_looked_at(arguments, pair, monkeypatch):
    monkeypatch.chdir(pair)
    arguments["verifier"]["target"] = "nowhere"
    message = refusal(arguments)
    assert message.startswith("verifier.target is 'nowhere'")
    assert str(pair / "nowhere") in message
    assert str(CHECKOUT / "nowhere") in message


def test_a_directory_without_config_is_no_checkpoint(arguments, pair):
    (pair / "drafter" / "config.json").unlink()
    assert "drafter.checkpoint is" in refusal(arguments)
    assert "holds no config.json" in refusal(arguments)


def test_a_directory_without_weights_is_no_checkpoint(arguments, pair):
    (pair / "target" / "model.safetensors").unlink()
    assert "verifier.target is" in refusal(arguments)
    assert "holds no *.safetensors file" in refusal(arguments)


@pytest.mark.parametrize(
    ("field", "value", "of_target"),
    [("hidden_size", 64, 32), ("vocab_size", 99, 100), ("num_target_layers", 6, 4)],
)
def test_a_drafter_of_another_target_is_refused_with_field_and_both_values(arguments, change, field, value, of_target):
    change("drafter", **{field: value})
    message = refusal(arguments)
    assert "does not fit verifier.target" in message
    assert f"{field} is {value}" in message
    assert f"is {of_target} in" in message


def test_taps_beyond_the_target_are_refused(arguments, change):
    change("drafter", dflash_config={"target_layer_ids": [1, 4], "mask_token_id": 99})
    message = refusal(arguments)
    assert "target_layer_ids [1, 4]" in message
    assert "num_target_layers 4" in message


def test_a_mask_token_outside_the_vocabulary_is_refused(arguments, change):
    change("drafter", dflash_config={"target_layer_ids": [1, 2], "mask_token_id": 100})
    assert "mask_token_id is 100" in refusal(arguments)


def test_ranks_that_cannot_share_the_heads_are_refused(arguments):
    arguments["verifier"]["tensor_parallel_size"] = 3
    message = refusal(arguments)
    assert message.startswith("verifier.target: ")
    assert "num_attention_heads" in message
    assert "3" in message


def test_a_context_beyond_the_checkpoint_is_refused(arguments):
    arguments["verifier"]["max_context"] = 1000
    assert "verifier.max_context is 1000" in refusal(arguments)
    assert "512" in refusal(arguments)


def test_a_gpu_rank_without_a_gpu_in_its_bundle_is_refused(arguments):
    arguments["verifier"].update(device="cuda", rank_resources={"CPU": 1})
    assert "verifier.rank_resources holds no GPU" in refusal(arguments)


def test_an_unsupported_family_is_named(arguments, pair):
    config = json.loads((pair / "target" / "config.json").read_text())
    (pair / "target" / "config.json").write_text(json.dumps({**config, "model_type": "mamba9"}))
    assert "mamba9" in refusal(arguments)


def test_a_step_table_is_found_as_checkpoints_are_and_read_before_anything_starts(arguments, pair, monkeypatch):
    monkeypatch.chdir(pair)
    step = {"requests": 1, "rows": 1, "context": 8, "seconds": 0.01}
    (pair / "steps.json").write_text(json.dumps({"format": 1, "shape": "tiny", "layers": 4, "verify": [step]}))
    arguments["verifier"]["speculation"] = {"step_table": "steps.json"}
    found = checked(Application.model_validate(arguments))
    assert found.verifier.speculation.step_table == str(pair / "steps.json")
    arguments["verifier"]["speculation"] = {"draft_table": "none.json"}
    assert "verifier.speculation.draft_table is 'none.json', but there is no file" in refusal(arguments)
    arguments["verifier"]["speculation"] = {"draft_table": "steps.json"}
    assert "holds 'verify' and no 'draft'" in refusal(arguments)
