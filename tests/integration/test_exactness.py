"""The served pair says what transformers says: two ranks, the drafter in another process, eight requests at once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.api.engine_client import EngineClient
from cluster.contracts import EngineRequest, SamplingParams
from cluster.tls import Access
from tests.integration.reference import Reference
from tests.integration.serving import Served, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = (
    "def read_lines(path):\n",
    "import os\nimport sys\n\n\nclass Queue:\n    def __init__(self, maxsize=0):\n",
    "    def __repr__(self):\n        return ",
    "for",
    'def main():\n    """Run the program."""\n    parser = argparse.ArgumentParser()\n' * 6,
    "    try:\n        import ",
    "# Copyright",
    "x = [",
)
LENGTHS = (96, 160, 40, 200, 120, 64, 8, 150)


@dataclass(frozen=True)
class Answer:
    token_ids: tuple[int, ...]
    accepted: int
    drafted: int


@pytest.fixture(scope="module")
def prompts(checkpoints: tuple[Path, Path]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoints[0] / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in PROMPTS]


@pytest.fixture(scope="module")
def linked(app: Served) -> Served:
    eventually(lambda: app.status().linked, 60, lambda: f"no drafter is linked: {app.status()}")
    return app


def answers(app: Served, requests: Sequence[EngineRequest]) -> list[Answer]:
    """All requests at once on the engine port of the served verifier, to their ends."""

    async def one(engine: EngineClient, request: EngineRequest) -> Answer:
        tokens: list[int] = []
        accepted = drafted = 0
        async for delta in engine.submit(request):
            assert delta.error is None, delta.error
            tokens += delta.token_ids
            accepted += delta.accepted
            drafted += delta.drafted
        return Answer(tuple(tokens), accepted, drafted)

    (address,) = app.verifiers()

    async def run() -> list[Answer]:
        engine = await EngineClient.connect(address, 5.0, Access(app.secret))
        try:
            async with asyncio.timeout(240):
                return await asyncio.gather(*(one(engine, request) for request in requests))
        finally:
            engine.close()

    return asyncio.run(run())


def request(name: str, prompt: Sequence[int], tokens: int, **more: object) -> EngineRequest:
    fields = {"request_id": f"{name}-{random.getrandbits(64):x}", "seed": 7, "stop_token_ids": frozenset({2})}
    return EngineRequest(prompt_ids=tuple(prompt), max_new_tokens=tokens, **(fields | more))  # type: ignore[arg-type]


def test_eight_greedy_requests_at_once_equal_transformers_generate(linked, prompts, checkpoints):
    reference = Reference(checkpoints[0])
    got = answers(linked, [request("greedy", p, n) for p, n in zip(prompts, LENGTHS, strict=True)])
    assert sum(answer.accepted for answer in got) > 0, "no draft was accepted: this proves nothing about drafting"
    ties = sum(reference.ties(prompt, answer.token_ids) for prompt, answer in zip(prompts, got, strict=True))
    for prompt, answer, tokens in zip(prompts, got, LENGTHS, strict=True):
        if ties == 0:
            assert list(answer.token_ids) == reference.generate(prompt, tokens)
    print(f"ties within 1e-4: {ties} of {sum(len(answer.token_ids) for answer in got)} tokens")


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_seeded_text_is_the_same_with_drafting_on_and_off(linked, prompts, temperature):
    sampling = SamplingParams(temperature=temperature, top_p=0.95, top_k=50)

    def run(limit: int | None) -> list[Answer]:
        made = [
            request("seeded", p, n, seed=100 + i, sampling=sampling, max_draft_tokens=limit)
            for i, (p, n) in enumerate(zip(prompts, LENGTHS, strict=True))
        ]
        return answers(linked, made)

    drafted, plain = run(None), run(0)
    assert sum(answer.accepted for answer in drafted) > 0
    assert sum(answer.drafted for answer in plain) == 0
    assert [a.token_ids for a in drafted] == [a.token_ids for a in plain]


def test_a_resumed_request_goes_on_where_it_stopped(linked, prompts):
    sampling = SamplingParams(temperature=0.9)
    (whole,) = answers(linked, [request("whole", prompts[1], 80, sampling=sampling)])
    begun = whole.token_ids[:31]
    (rest,) = answers(linked, [request("rest", prompts[1], 80, sampling=sampling, generated_ids=begun)])
    assert begun + rest.token_ids == whole.token_ids


def test_text_over_http_is_the_detokenized_greedy_text(linked, prompts, checkpoints):
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(checkpoints[0] / "tokenizer.json")).decode(
        Reference(checkpoints[0]).generate(prompts[0], 48), skip_special_tokens=True
    )
    body = {"model": linked.model, "prompt": PROMPTS[0], "max_tokens": 48, "temperature": 0}
    answer = httpx.post(f"{linked.url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["text"] == expected
