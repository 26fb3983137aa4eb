"""Prefix hits over real, tiny models of every family: what is found in the cache changes no text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.contracts import EngineInfo, EngineRequest
from modeling.kv_dtype import KvDtype
from tests.verifier_service.model import tiny_targets
from tests.verifier_service.test_engine import Inbox
from tests.verifier_service.test_real_model import Oracle
from verifier_service.engine import Engine
from verifier_service.model.runner import TargetRunner
from verifier_service.scheduler import SchedulerLimits

BLOCK, BLOCKS = 4, 80
OUTPUT = 14
HYBRIDS = ("qwen3_5", "qwen3_5_moe", "qwen3_next")


@dataclass
class Talk:
    """An engine that is asked one thing after the other, and what it had in its cache."""

    engine: Engine
    inbox: Inbox

    def say(self, name: str, prompt: list[int], **changes) -> list[int]:
        self.engine.submit(EngineRequest(name, tuple(prompt), seed=1, max_new_tokens=OUTPUT, **changes), self.inbox)
        self.inbox.wait(name)
        assert self.inbox.finish(name) == "length"
        return self.inbox.text(name)

    def hits(self) -> float:
        return self.engine.status().counters["prefix_hit_tokens"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    built: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in built:
            built[family] = tmp_path_factory.mktemp(family)
            tiny_targets.build(family, built[family])
        return built[family]

    return directory


@pytest.fixture
def talk(directories):
    """A function that starts an engine of a family."""
    started: list[Engine] = []

    def start(
        family: str, prefix_cache: bool, proposer=None, checkpoint_bytes: int = 1 << 20, kv_dtype: KvDtype = "auto"
    ) -> Talk:
        limits = SchedulerLimits(3, BLOCKS, BLOCK, step_tokens=20, max_waiting=9, prefix_cache=prefix_cache)
        runner = TargetRunner(
            directories(family),
            num_blocks=BLOCKS,
            block_tokens=BLOCK,
            num_slots=3,
            dtype=torch.float32,
            device="cpu",
            kv_dtype=kv_dtype,
            max_context=128,
            checkpoint_bytes=checkpoint_bytes,
        )
        engine = Engine(runner, limits, EngineInfo("e", "f", 128, runner.shape.vocabulary, 3, 8), proposer=proposer)
        started.append(engine)
        engine.start()
        return Talk(engine, Inbox())

    yield start
    for engine in started:
        engine.stop()


def conversation(own: Talk) -> dict[str, list[int]]:
    """Four turns; a question asked again; one that parts from the first in the middle, and another that parts there."""
    rng = random.Random(11)
    texts: dict[str, list[int]] = {}
    first = history = [rng.randrange(250) for _ in range(21)]
    for turn in range(4):
        name = f"turn{turn}"
        texts[name] = own.say(name, history)
        history = history + texts[name] + [rng.randrange(250) for _ in range(3)]
    texts["again"] = own.say("again", first)
    for name in ("parting", "parted"):
        texts[name] = own.say(name, first[:13] + [rng.randrange(250) for _ in range(6)])
    return texts


@pytest.mark.parametrize("family", tiny_targets.CONFIGS)
def test_a_hit_equals_a_miss_with_drafts_and_without(family, talk):
    missed = conversation(talk(family, prefix_cache=False))
    for drafts in (None, "partly"):
        own = talk(family, True, None if drafts is None else Oracle(missed, drafts))
        assert conversation(own) == missed
        counters = own.engine.status().counters
        assert counters["prefix_queried_tokens"] == 21 + 38 + 55 + 72 + 21 + 19 + 19
        # Turns 1, 2, 3 go on from the last block of the text before that was filled, the repeated question from its own
        # last boundary; of the two that part in the middle, a hybrid's first has no checkpoint there.
        assert counters["prefix_hit_tokens"] == 32 + 48 + 68 + 20 + (0 if family in HYBRIDS else 12) + 12
        assert (counters["accepted_tokens"] > 0) == (drafts is not None)


@pytest.mark.parametrize("family", ["qwen3_5", "deepseek_v3"])
def test_an_fp8_caches_hits_and_drafts_change_nothing_either(family, talk):
    """Rounding depends on nothing but the token: only a value within 1e-6 of a boundary may fall to either side."""
    missed = conversation(talk(family, prefix_cache=False, kv_dtype="float8_e4m3"))
    own = talk(family, True, Oracle(missed, "partly"), kv_dtype="float8_e4m3")
    assert conversation(own) == missed
    assert own.hits() > 100
    assert own.engine.status().counters["accepted_tokens"] > 0


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_another_tenant_hits_nothing(family, talk):
    own = talk(family, True)
    prompt = list(range(30))
    text = own.say("ours", prompt, cache_salt="red")
    assert own.say("theirs", prompt, cache_salt="blue") == own.say("nobodys", prompt) == text
    assert own.hits() == 0
    assert own.say("ours-again", prompt, cache_salt="red") == text
    assert own.hits() == 28


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_a_resumed_request_hits_what_it_had_generated(family, talk):
    own = talk(family, True)
    prompt = list(range(22))
    text = own.say("a", prompt)
    rest = own.say("b", prompt, generated_ids=tuple(text[:11]))
    assert text[:11] + rest == text
    assert own.hits() == 32 if family == "qwen3" else 20  # a hybrid's output has one checkpoint, at 32: beyond the last


def test_a_hybrid_without_room_for_a_checkpoint_hits_nothing_and_says_the_same(talk):
    own = talk("qwen3_5", True, checkpoint_bytes=0)
    assert conversation(own) == conversation(talk("qwen3_5", prefix_cache=False))
    assert own.hits() == 0


def test_a_hybrid_with_one_checkpoint_says_the_same(talk):
    one = talk("qwen3_5", True).engine._runner._executor._states.bytes_per_state
    own = talk("qwen3_5", True, checkpoint_bytes=one)
    assert conversation(own) == conversation(talk("qwen3_5", prefix_cache=False))
    assert own.hits() > 0
