"""`paceline plan` on every shipped deploy file, and on files that cannot work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from deploy.architecture import shipped_names
from paceline.plan.cli import plan
from paceline.plan.document import Assumed, Plan, make_plan
from paceline.plan.reading import Options, read_inputs

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
FILES = sorted(DEPLOY.glob("*.yaml"))
SIZED = [path for path in FILES if path.name != "tiny.yaml"]


def plan_of(path: Path, options: Options = Options(), assumed: Assumed = Assumed(concurrency=(16,))) -> Plan:
    return make_plan(str(path), read_inputs(path, options), assumed)


def run(*arguments: str | Path):
    app = typer.Typer()
    app.command()(plan)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def changed(tmp_path: Path):
    """changed("qwen3-8b", verifier={...}) is a copy of that deploy file with other arguments."""

    def copy(name: str, **sections: dict) -> Path:
        raw = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
        for section, values in sections.items():
            raw["applications"][0]["args"][section] |= values
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return copy


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_deploy_file_fits_the_gpus_that_it_asks_for(path):
    made = plan_of(path)
    assert made.fits, made.problems
    assert made.drafter is not None
    assert path == DEPLOY / "tiny.yaml" or made.target.gpu is not None
    assert not [note for note in made.notes if "without drafts" in note]


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_a_shipped_deploy_file_says_for_which_gpus_it_is_and_what_to_change(path):
    head = path.read_text().partition("proxy_location")[0]
    asked = yaml.safe_load(path.read_text())["applications"][0]["args"]["verifier"]["rank_resources"]
    assert next(key for key in asked if key.startswith("accelerator_type:")).partition(":")[2] in head
    assert "To change:" in head


def test_there_is_a_deploy_file_for_every_shipped_target():
    served = {yaml.safe_load(path.read_text())["applications"][0]["args"]["verifier"]["architecture"] for path in SIZED}
    assert served >= {name for name in shipped_names() if not name.endswith("-dflash")} - {"qwen3.5-397b-a17b"}


def test_what_fits_is_printed_and_written_with_exit_code_0(tmp_path):
    result = run(DEPLOY / "kimi-k2.5.yaml", "--json", tmp_path / "plan.json", "--concurrency", "16")
    assert result.exit_code == 0, result.output
    for shown in ("1026.41 B parameters", "MLA latents are replicated", "draft-context capacity", "1 for "):
        assert shown in result.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["fits"]
    assert written["link"]["token_bytes"] == 2 * 7168
    assert written["target"]["cache"]["token_bytes"] == 61 * 576 * 2
    (load,) = written["loads"]
    assert load["link_bytes_per_step"] == pytest.approx(16 * load["step"]["committed"] * 2 * 7168)


@pytest.mark.parametrize("name", ["qwen397b", "kimi-k2.5"])
def test_the_documentation_shows_what_is_printed(name, monkeypatch):
    monkeypatch.chdir(DEPLOY.parent)
    printed = [line.rstrip() for line in run(f"deploy/{name}.yaml").output.rstrip().splitlines()]
    page = (DEPLOY.parent / "docs" / "plan.md").read_text()
    assert "\n".join(printed) in page, f"paste the output of `paceline plan deploy/{name}.yaml` into docs/plan.md"


def test_what_does_not_fit_ends_with_exit_code_1_and_what_would():
    result = run(DEPLOY / "kimi-k2.5.yaml", "--gpu", "H100")
    assert result.exit_code == 1
    assert "does not fit: a rank of the verifier needs" in result.output
    assert "would fit: verifier.tensor_parallel_size: 16" in result.output


def test_a_checkpoint_that_is_not_here_and_has_no_architecture_is_an_error(changed):
    result = run(changed("qwen3-8b", verifier={"architecture": None}))
    assert result.exit_code == 2
    assert "which is not on this machine: set verifier.architecture (or --architecture)" in result.output


def test_ranks_that_cannot_divide_the_target_are_an_error(changed):
    result = run(changed("qwen3-8b", verifier={"tensor_parallel_size": 3}))
    assert result.exit_code == 2
    assert "tensor_parallel_size 3 does not divide num_attention_heads = 32" in result.output


def test_a_drafter_of_another_target_is_an_error(changed):
    result = run(changed("qwen3-8b", drafter={"architecture": "qwen3-4b-dflash"}))
    assert result.exit_code == 2
    assert re.search(r"hidden_size is 2560 in \S+, but hidden_size is 4096 in \S+", result.output)


def test_an_acceptance_length_beyond_the_block_is_an_error():
    result = run(DEPLOY / "kimi-k2.5.yaml", "--acceptance", "9")
    assert result.exit_code == 2
    assert "not between 1 and the block size 8" in result.output


def test_a_colocated_drafter_is_counted_on_the_first_rank(changed):
    remote = plan_of(changed("qwen3-4b"))
    colocated = plan_of(changed("qwen3-4b", verifier={"speculation": {"mode": "colocated"}}))
    assert colocated.link is None
    assert colocated.drafter is not None
    added = colocated.target.memory.drafter - remote.target.memory.drafter
    assert added == colocated.drafter.memory.weights + 64 * colocated.drafter.context_bytes
    assert [group.name for group in colocated.groups] == ["router", "verifier"]


def test_plain_decoding_needs_no_drafter(changed):
    made = plan_of(changed("qwen3-8b", verifier={"speculation": {"mode": "none"}}))
    assert (made.drafter, made.link, made.loads) == (None, None, ())
    assert made.target.memory.drafter == 0


def test_a_gpu_type_of_the_command_line_takes_the_place_of_the_files():
    made = plan_of(DEPLOY / "qwen3-8b.yaml", Options(gpu="L40S", drafter_gpu="A100"))
    assert made.target.gpu == "L40S"
    assert made.drafter is not None
    assert made.drafter.gpu == "A100"
    assert not made.fits


@pytest.mark.parametrize(("share", "window"), [(0.9, 4096), (0.5, 8192)])
def test_auto_contexts_are_those_that_the_drafters_gpu_has_room_for(share, window, changed):
    part = {"max_contexts": "auto", "memory_share": share, "window": window}
    drafter = plan_of(changed("qwen3-8b", drafter=part), Options(gpu="H200", drafter_gpu="L40S")).drafter
    assert drafter is not None
    assert drafter.memory.available is not None
    left = share * drafter.memory.available - drafter.memory.total
    assert 0 <= left < drafter.context_bytes
    assert drafter.memory.contexts == drafter.max_contexts * drafter.context_bytes


def test_contexts_that_drafters_cannot_hold_are_noted(changed):
    made = plan_of(changed("qwen3-8b", drafter={"max_contexts": 16}))
    assert any("drafters hold 16 contexts, verifiers run up to 128 requests" in note for note in made.notes)


def test_measured_steps_take_the_place_of_estimates_and_are_named(tmp_path):
    step = {"requests": 1, "rows": 1, "context": 64, "seconds": 0.02}
    table = {"format": 1, "shape": "qwen3-8b", "device": "a GPU", "layers": 36, "verify": [step]}
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(table))
    made = plan_of(DEPLOY / "qwen3-8b.yaml", Options(steps=path))
    assert made.priced[0] == "steps measured: qwen3-8b on a GPU"
    assert "estimated, no table" in made.priced[1]
    assert made.loads[0].plain_s == pytest.approx(0.02)
    assert "seconds: steps measured" in " ".join(run(DEPLOY / "qwen3-8b.yaml", "--steps", path).output.split())
