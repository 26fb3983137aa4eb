import pytest
from pydantic import ValidationError

from deploy.checks import explained
from deploy.config import Application


def problems(arguments) -> str:
    with pytest.raises(ValidationError) as caught:
        Application.model_validate(arguments)
    return "\n".join(explained(caught.value))


def test_each_fact_is_written_once_and_reaches_both_services(arguments):
    arguments["verifier"]["link"] = {"token": "secret", "heartbeat_s": 0.2}
    app = Application.model_validate(arguments)
    assert app.drafter is not None
    assert app.drafter.target == app.verifier.target
    assert app.verifier.drafter == app.drafter.checkpoint
    assert (app.drafter.token, app.drafter.heartbeat_s) == ("secret", 0.2)


def test_a_misspelt_key_is_named_with_its_place_and_what_was_meant(arguments):
    arguments["verifier"]["max_request"] = 3
    assert problems(arguments) == "unknown key 'max_request' in verifier: did you mean 'max_requests'?"


def test_all_unknown_keys_are_reported_at_once_even_deep_ones(arguments):
    arguments["verifier"]["speculation"] = {"mod": "none"}
    arguments["colour"] = "blue"
    message = problems(arguments)
    assert "unknown key 'mod' in verifier.speculation: did you mean 'mode'?" in message
    assert "unknown key 'colour': known keys are drafter, model_name, router, verifier" in message


def test_a_wrong_type_names_the_key_and_the_value(arguments):
    arguments["verifier"]["max_requests"] = "many"
    assert problems(arguments).startswith("verifier.max_requests: ")
    assert "'many'" in problems(arguments)


def test_a_missing_target_names_the_key(arguments):
    del arguments["verifier"]["target"]
    assert "verifier.target" in problems(arguments)


def test_disaggregated_drafting_needs_a_drafter_section(arguments):
    del arguments["drafter"]
    arguments["verifier"]["drafter"] = "somewhere"
    assert "there is no drafter section" in problems(arguments)


def test_contradicting_targets_are_refused(arguments):
    arguments["drafter"]["target"] = "/another"
    assert "drafter.target and verifier.target differ" in problems(arguments)


def test_contradicting_tokens_are_refused_without_showing_them(arguments):
    arguments["verifier"]["link"] = {"token": "hush"}
    arguments["drafter"]["token"] = "whisper"
    message = problems(arguments)
    assert "drafter.token and verifier.link.token differ" in message
    assert "hush" not in message
    assert "whisper" not in message


def test_plain_decoding_starts_no_drafter(arguments):
    arguments["verifier"]["speculation"] = {"mode": "none"}
    assert not Application.model_validate(arguments).drafts_remotely


def test_a_replica_has_a_bundle_for_its_front_and_one_for_each_rank(arguments):
    arguments["verifier"]["rank_resources"] = {"CPU": 0.5}
    assert Application.model_validate(arguments).verifier.bundles == [{"CPU": 0.1}, {"CPU": 0.5}, {"CPU": 0.5}]


def test_a_rank_on_a_gpu_asks_for_one_by_default(arguments):
    arguments["verifier"]["device"] = "cuda"
    assert Application.model_validate(arguments).verifier.bundles[1] == {"GPU": 1.0, "CPU": 1.0}
