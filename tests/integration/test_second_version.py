"""A target with a DFlash 2 drafter in one process: all of the product between a prompt and its text, Ray apart."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from cluster.contracts import EngineInfo, EngineRequest
from deploy.link import colocated_link
from modeling.dflash import FeatureFuser
from modeling.target_config import target_fingerprint
from tests.drafter_service.pairs import (
    BLOCK,
    FULL,
    MAX_CONTEXT,
    SLIDING,
    VOCABULARY,
    second,
    write_drafter,
    write_target,
)
from tests.verifier_service.families.verdict import generate
from tests.verifier_service.test_engine import Inbox
from verifier_service.config import VerifierSettings
from verifier_service.engine import Engine
from verifier_service.features import FeatureStore
from verifier_service.model.runner import TargetRunner
from verifier_service.proposers.linked import LinkProposer
from verifier_service.scheduler import SchedulerLimits

PROMPTS = [(5, 9, 2, 7, 7, 1), (3,), tuple(range(4, 25))]
OUTPUT, BLOCKS, BLOCK_TOKENS = 40, 80, 4


def linked(target: Path, drafter: Path, fuser: FeatureFuser) -> LinkProposer:
    settings = VerifierSettings.model_validate(
        {
            "target": str(target),
            "drafter": str(drafter),
            "dtype": "float32",
            "device": "cpu",
            "speculation": {"mode": "colocated"},
        }
    )
    fingerprint = target_fingerprint(target)
    return LinkProposer(
        colocated_link(settings, fuser, verifier_id="v", target_fingerprint=fingerprint, vocabulary=VOCABULARY),
        fuser,
        FeatureStore(1 << 20, BLOCK_TOKENS, fuser.hidden),
        verifier_id="v",
        max_draft_tokens=None,
        soft_deadline_s=1.0,
    )


def test_the_text_with_a_colocated_second_version_is_the_targets_own(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    target = write_target(tmp_path / "target")
    drafter = write_drafter(tmp_path / "drafter", **{"layer_types": [SLIDING, FULL], "sliding_window": 16, **second()})
    fuser = FeatureFuser.load(drafter)
    runner = TargetRunner(
        target,
        num_blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        num_slots=4,
        dtype=torch.float32,
        device="cpu",
        max_context=MAX_CONTEXT,
        taps=fuser.target_layer_ids,
    )
    limits = SchedulerLimits(slots=4, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, step_tokens=40, max_waiting=20)
    info = EngineInfo("e", "f", MAX_CONTEXT, VOCABULARY, 4, BLOCK)
    engine = Engine(runner, limits, info, proposer=linked(target, drafter, fuser))
    inbox = Inbox()
    for i, prompt in enumerate(PROMPTS):
        engine.submit(EngineRequest(f"r{i}", prompt, seed=i, max_new_tokens=OUTPUT), inbox)
    engine.start()
    inbox.wait(*(f"r{i}" for i in range(len(PROMPTS))))
    engine.stop()
    model = Qwen3ForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    for i, prompt in enumerate(PROMPTS):
        assert inbox.text(f"r{i}") == list(generate(model, prompt, OUTPUT))
    counters = engine.status().counters
    assert counters["drafted_tokens"] > 0
    assert counters["accepted_tokens"] > 0
    assert counters.get("drafting_failures", 0) == 0
