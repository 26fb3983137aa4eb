"""The served application from outside: requests, and what is left of them when processes die."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.integration.serving import Served, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = "def fibonacci(n):\n"
REPLACED_S = 60.0


@pytest.fixture
def client(app: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0, timeout=60)


def complete(client: openai.OpenAI, app: Served, tokens: int = 16) -> str:
    answer = client.completions.create(model=app.model, prompt=PROMPT, max_tokens=tokens, temperature=0)
    return answer.choices[0].text


def wait_until_linked(app: Served) -> None:
    eventually(lambda: app.status().linked, REPLACED_S, lambda: f"no drafter is linked: {app.status()}")


def test_a_completion_comes_from_two_ranks_and_a_drafter(app, client):
    wait_until_linked(app)
    assert len(app.processes("VerifierRank")) == 2
    assert len(app.processes("DrafterModel")) == 1
    assert complete(client, app) == complete(client, app) != ""


def test_an_answer_in_a_schema_is_drafted_and_the_same_without_drafts(app, client):
    wait_until_linked(app)
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["alpha", "beta"]}, "sizes": {"type": "array", "items": {"type": "integer"}}},
        "required": ["name", "sizes"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}

    def answer(**more: object) -> str:
        done = client.chat.completions.create(
            model=app.model,
            messages=[{"role": "user", "content": "Describe a thing."}],
            response_format=asked,
            max_completion_tokens=60,
            temperature=0.7,
            seed=3,
            extra_body=more,
        )
        return done.choices[0].message.content or ""

    drafted = answer()
    assert drafted.startswith("{")
    assert '"name"' in drafted
    assert answer(max_draft_tokens=0) == drafted
    if drafted.rstrip().endswith("}"):  # else the limit of tokens cut it off
        assert set(json.loads(drafted)) == {"name", "sizes"}


def test_health_is_ok_only_where_tokens_can_be_generated(app):
    assert app.health().status_code == 200


def test_an_unknown_model_is_refused_in_openai_shape(app, client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="another", prompt=PROMPT)
    assert "another" in caught.value.message


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_drafter_costs_no_request_and_drafting_resumes_without_a_restart(app, client, how):
    wait_until_linked(app)
    expected = complete(client, app, 200)
    ranks, drafter = app.processes("VerifierRank"), app.processes("DrafterModel")
    with Streams(client, app, 8) as texts:
        os.kill(next(iter(drafter.values())), how)
    assert [text == expected for text in texts] == [True] * 8
    eventually(
        lambda: app.status().linked and set(app.processes("DrafterModel")).isdisjoint(drafter),
        REPLACED_S,
        lambda: f"no new drafter is linked: {app.processes('DrafterModel')} {app.status()}",
    )
    assert complete(client, app, 200) == expected
    assert app.processes("VerifierRank") == ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_requests_with_an_error_and_the_service_answers_again(app, client, rank):
    expected = complete(client, app)
    ranks = app.processes("VerifierRank")
    victim = next(pid for name, pid in ranks.items() if name.endswith(f":{rank}"))
    body = {"model": app.model, "prompt": PROMPT, "max_tokens": 1500, "temperature": 1.0, "stream": True}
    with httpx.stream("POST", f"{app.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data:"))
        assert "text" in first
        os.kill(victim, signal.SIGKILL)
        rest = [line for line in lines if line.startswith("data:")]
    assert any('"error"' in line for line in rest[-2:]), rest[-2:]
    eventually(
        lambda: set(app.processes("VerifierRank")).isdisjoint(ranks) and app.health().status_code == 200,
        REPLACED_S,
        lambda: f"the replica was not replaced: {app.processes('VerifierRank')}",
    )
    assert complete(client, app) == expected


class Streams:
    """Starts `count` greedy streams of 200 tokens; inside the block all have begun; after it `texts` are complete."""

    def __init__(self, client: openai.OpenAI, app: Served, count: int):
        self.texts = [""] * count
        self._begun = [threading.Event() for _ in range(count)]
        self._threads = [threading.Thread(target=self._run, args=(client, app, i)) for i in range(count)]

    def __enter__(self) -> list[str]:
        for thread in self._threads:
            thread.start()
        for begun in self._begun:
            assert begun.wait(60), "a stream did not begin"
        return self.texts

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a stream hangs"

    def _run(self, client: openai.OpenAI, app: Served, index: int) -> None:
        for text in self._pieces(client, app):
            self.texts[index] += text
            self._begun[index].set()

    @staticmethod
    def _pieces(client: openai.OpenAI, app: Served) -> Iterator[str]:
        stream = client.completions.create(model=app.model, prompt=PROMPT, max_tokens=200, temperature=0, stream=True)
        for chunk in stream:
            if chunk.choices:
                yield chunk.choices[0].text
