"""A small byte-level tokenizer, a target directory around it, and routers over fake engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.api.tokens import Tokens
from tests.cluster.api.fake_engine import FakeEngine
from tests.cluster.api.harness import Loop, Served, make_served

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["def hello(name):\n    return 'hello ' + name\n", "the quick brown fox jumps over the lazy dog\n"] * 4
ANSWER = "hello wörld 💥 — the end\n    return name"


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target's directory as far as a router reads it. <|im_end|> (id 2) ends a generation."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    directory = tmp_path_factory.mktemp("target")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    return directory


@pytest.fixture(scope="session")
def tokens(target: Path) -> Tokens:
    return Tokens.load(target)


@pytest.fixture(scope="session")
def answer_ids(tokens: Tokens) -> list[int]:
    """What fake engines say, as ids."""
    return tokens.tokenizer.encode(ANSWER).ids


@pytest.fixture
def new_engine(answer_ids: list[int]) -> Callable[..., FakeEngine]:
    def make(engine_id: str = "one", **keywords: Any) -> FakeEngine:
        return FakeEngine(engine_id, answer_ids, 2, **keywords)

    return make


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    running = Loop()
    yield running
    running.stop()


@pytest.fixture
def serve(loop: Loop, target: Path) -> Iterator[Callable[..., Served]]:
    """serve(engine, ..., max_in_flight=1) starts a router over fake engines with these settings."""
    started: list[Served] = []

    def start(*engines: FakeEngine, **settings: Any) -> Served:
        served = make_served(loop, Tokens.load(target), list(engines), **settings)
        started.append(served)
        served.start()
        return served

    yield start
    for served in started:
        served.stop()


@pytest.fixture
def engine(new_engine: Callable[..., FakeEngine]) -> FakeEngine:
    return new_engine()


@pytest.fixture
def served(serve: Callable[..., Served], engine: FakeEngine) -> Served:
    """A router over one engine."""
    return serve(engine)
