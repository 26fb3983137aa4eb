"""The runner over kernels says what the stock forward says, and runs nothing else."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError
from modeling import gates
from modeling.experts import LoopedExperts
from modeling.norms import FusedRMSNorm
from modeling.routing import SigmoidTopK, SoftmaxTopK
from tests.verifier_service.gpu_path.tiny import OVERRIDES, TinyTarget, build
from verifier_service.config import VerifierSettings
from verifier_service.fit import check_fit
from verifier_service.model import attention, delta_rule, gated_delta_net, latent_shape, touchpoints
from verifier_service.model.latent_attention import LatentAttention
from verifier_service.plan import PrefillChunk, StepPlan, VerifyRow

ROOT = Path(__file__).resolve().parents[3]
TAPS = (1, 0)
# Padding rows hold whatever their memory held.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{what} encountered") for what in ("overflow", "invalid value")]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyTarget]:
    return {family: build(family, tmp_path_factory.mktemp(family)) for family in OVERRIDES}


@pytest.fixture(autouse=True)
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where latents are expanded, of 16 tokens, so that contexts of these texts have several."""
    monkeypatch.setattr(latent_shape, "SECTION_ENTRIES", 1)
    monkeypatch.setattr(latent_shape, "SECTION_STEP", 16)


@pytest.fixture
def nothing_but_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel stands in for raises when it is called."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("torch computed what a kernel should have")

    for late in ("modeling.kernel_operations", "verifier_service.model.device.executor"):
        importlib.import_module(late)  # what is imported with the first runner must not keep what is put in here
    for file in sorted(ROOT.glob("kernels/*/reference.py")):
        module = importlib.import_module(f"kernels.{file.parent.name}.reference")
        for name, _ in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith(("_", "check")):
                monkeypatch.setattr(module, name, forbidden)
    stood_in_for: tuple[tuple[Any, str], ...] = (
        (attention, "_attend"),
        (attention, "_attend_with_sinks"),
        (delta_rule, "one_block"),
        (gated_delta_net, "one_block"),
        (gated_delta_net, "one_token"),
        (gated_delta_net.RaggedGatedDeltaNet, "_prefill"),
        (torch.linalg, "solve_triangular"),
        (torch.nn.functional, "softplus"),
        (touchpoints, "run_layer"),
        (FusedRMSNorm, "forward"),
        (torch.nn.functional, "scaled_dot_product_attention"),
        (torch.nn.functional, "linear"),
        (SoftmaxTopK, "__call__"),
        (SigmoidTopK, "__call__"),
        (LatentAttention, "forward"),
        (gates, "silu_gate"),
        (LoopedExperts, "__call__"),
    )
    for owner, name in stood_in_for:
        monkeypatch.setattr(owner, name, forbidden)


@pytest.mark.parametrize("family", OVERRIDES)
def test_kept_tokens_have_the_stock_forwards_logits(family, targets, nothing_but_kernels):
    runner = targets[family].runner(taps=TAPS[1:])
    assert max(targets[family].worst(runner, TAPS[1:])) < 1e-4
    counters = runner.counters()
    steps = [step.plan for step in targets[family].steps]
    assert counters["eager_steps"] == sum(bool(plan.prefill) for plan in steps), "verify steps run in buckets"
    assert counters["graph_rows"] == sum(
        len(row.token_ids) for plan in steps if not plan.prefill for row in plan.verify
    )
    assert counters["graph_padding_rows"] > 0, "the schedule needs padding, or it proves nothing of it"


def test_every_row_has_the_torch_runners_logits_and_taps(targets):
    target = targets["qwen3_5_moe"]
    outputs = [[target.runner(kernels, taps=TAPS).forward(target.steps[0].plan)] for kernels in ("torch", "triton")]
    for right, own in zip(*outputs):
        torch.testing.assert_close(own.logits, right.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own.taps, right.taps, rtol=1e-4, atol=1e-5)


def test_checkpoints_of_recurrent_state_are_the_torch_runners(targets):
    """One of a prompt's end, one from inside a verified row; both go on in slots of their own."""
    blocks = tuple((slot, 3 * slot + index) for slot in range(3) for index in range(3))
    plans = (
        StepPlan(1, new_blocks=blocks, prefill=(PrefillChunk(0, 0, (5, 9, 2, 7), completes_prompt=True),)),
        StepPlan(2, saved=((0, 0, 1),), verify=(VerifyRow(0, 4, (8, 6, 4)),)),
        StepPlan(
            3,
            decided=((0, 2),),
            saved=((0, 1, 0),),
            restored=((1, 0), (2, 1)),
            verify=tuple(VerifyRow(slot, start, (3, 1)) for slot, start in ((0, 6), (1, 5), (2, 4))),
        ),
        StepPlan(4, decided=((0, 2), (1, 1), (2, 2)), verify=(VerifyRow(2, 6, (4,)), VerifyRow(1, 6, (4, 5)))),
        StepPlan(5, heartbeat=True),
    )
    runners = [targets["qwen3_5_moe"].runner(kernels, checkpoint_bytes=1 << 20) for kernels in ("torch", "triton")]
    for plan in plans:
        right, own = (runner.forward(plan).logits for runner in runners)
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe"])
def test_a_step_that_computes_with_torch_is_noticed(family, targets, nothing_but_kernels):
    with pytest.raises(AssertionError, match="torch computed"):
        targets[family].worst(targets[family].runner("torch"))


def test_an_fp8_cache_differs_from_torchs_by_no_more_than_its_rounding(targets):
    """Triton's interpreter loses the carry when it rounds to fp8: a number may be off by its last of three bits."""
    target = targets["qwen3"]
    outputs = [
        [runner.forward(step.plan).logits for step in target.steps[:2]]
        for runner in (target.runner(kernels, kv_dtype="float8_e4m3") for kernels in ("torch", "triton"))
    ]
    scale = max(float(logits.abs().max()) for logits in outputs[0])
    worst = max(float((own - right).abs().max()) for own, right in zip(*outputs))
    assert worst < 0.1 * scale


def test_triton_on_a_cpu_is_refused_with_a_cure(targets, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settings = VerifierSettings(
        target=str(targets["qwen3"].directory), device="cpu", kernels="triton", speculation={"mode": "none"}
    )
    with pytest.raises(ConfigError, match=r"verifier\.kernels is 'triton' but device is 'cpu'.*set kernels to 'auto'"):
        check_fit(settings)
