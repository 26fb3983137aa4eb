"""What happens to a request while it is generated: stop strings, clients that leave, engines that die, limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.cluster.api.conftest import ANSWER
from tests.cluster.api.harness import MODEL, WAIT_S, Served, eventually

PAUSE = 7


@contextlib.contextmanager
def streaming(served: Served, **fields: Any) -> Iterator[Iterator[Any]]:
    """The events of a streamed completion as they come; "[DONE]" as text."""
    body = {"model": MODEL, "prompt": "def f", "max_tokens": 200, "stream": True, **fields}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=WAIT_S) as response:
        yield (_event(line) for line in response.iter_lines() if line)


def _event(line: str) -> Any:
    data = line.removeprefix("data: ")
    return data if data == "[DONE]" else json.loads(data)


def text_of(events: list[Any]) -> str:
    return "".join(
        choice["text"] for event in events if "choices" in event and event != "[DONE]" for choice in event["choices"]
    )


@pytest.mark.parametrize("stop", ["wörld", "💥", "lo w", "\n    re", ["zzz", "end"]], ids=repr)
def test_text_ends_before_a_stop_string_whatever_the_steps(served, engine, stop):
    first = min(ANSWER.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in ANSWER)
    for engine.steps in ((1,), (2,), (3, 1), (50,)):
        whole = served.complete(stop=stop).json()["choices"][0]
        assert (whole["text"], whole["finish_reason"]) == (ANSWER[:first], "stop")
        with streaming(served, stop=stop) as events:
            streamed = list(events)
        assert text_of(streamed) == ANSWER[:first]
        assert streamed[-1] == "[DONE]"


def test_usage_after_a_stop_string_does_not_depend_on_the_steps(served, engine):
    counts = set()
    for engine.steps in ((1,), (2,), (50,)):
        counts.add(served.complete(stop="💥").json()["usage"]["completion_tokens"])
    assert len(counts) == 1


def test_a_stop_string_frees_the_request_on_its_engine(served, engine):
    engine.pause_after = 20
    assert served.complete(stop="wö").json()["choices"][0]["finish_reason"] == "stop"
    eventually(lambda: len(engine.aborted) == 1)


def test_text_that_only_began_like_a_stop_string_is_shown_at_the_end(served):
    assert served.complete(stop=ANSWER[-4:] + "x").json()["choices"][0]["text"] == ANSWER


def test_no_character_is_broken_in_a_stream(serve, engine):
    engine.steps = (1,)
    with streaming(serve(engine)) as events:
        texts = [event["choices"][0]["text"] for event in events if event != "[DONE]"]
    assert "💥" in texts
    assert "\ufffd" not in "".join(texts)


def test_logprobs_of_a_stop_string_are_left_out(served):
    answer = served.complete(stop="wörld", logprobs=0).json()["choices"][0]
    assert "".join(answer["logprobs"]["tokens"]) in (answer["text"], answer["text"] + "w")


def test_a_client_that_leaves_a_stream_frees_its_request(served, engine):
    engine.pause_after = PAUSE
    with streaming(served) as events:
        next(events)
    eventually(lambda: len(engine.aborted) == 1)
    assert engine.aborted[0][0] == engine.submitted[0].request_id
    eventually(lambda: served.metric("num_requests_running") == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_gives_up_waiting_frees_all_its_choices(served, engine, stream):
    engine.pause_after = 0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/v1/completions",
            json={"model": MODEL, "prompt": "a", "n": 3, "stream": stream},
            timeout=httpx.Timeout(WAIT_S, read=0.2),
        )
    eventually(lambda: sorted(choice for _, choice in engine.aborted) == [0, 1, 2])
    eventually(lambda: served.metric("num_requests_running") == 0)


def test_an_engine_killed_in_a_stream_ends_it_with_an_error_event(served, engine):
    engine.pause_after = PAUSE
    with streaming(served) as events:
        begun = [next(events)]
        served.kill(engine)
        rest = list(events)
    assert ANSWER.startswith(text_of(begun + rest))
    assert rest[-1]["error"]["code"] == "engine_unavailable"
    assert "no other engine" in rest[-1]["error"]["message"]


def test_the_official_client_raises_when_the_engine_dies_in_a_stream(served, engine):
    engine.pause_after = PAUSE
    stream = served.client().completions.create(model=MODEL, prompt="a", max_tokens=50, stream=True)
    next(stream)
    served.kill(engine)
    with pytest.raises(openai.APIError, match="no other engine"):
        list(stream)


def test_an_engine_killed_before_the_first_token_is_a_503(served, engine, loop):
    engine.pause_after = 0

    async def kill_once_submitted() -> None:
        while not engine.submitted:
            await asyncio.sleep(0.005)
        await engine.kill()

    killing = loop.start(kill_once_submitted())
    response = served.complete()
    killing.result(WAIT_S)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "engine_unavailable"


def test_another_engine_continues_the_text(serve, new_engine):
    engines = {name: new_engine(name) for name in ("one", "two")}
    served = serve(*engines.values())
    for engine in engines.values():
        engine.pause_after = PAUSE
    with streaming(served, seed=3, stream_options={"include_usage": True}) as events:
        begun = [next(events)]
        first = eventually(lambda: next((engine for engine in engines.values() if engine.submitted), None))
        second = next(engine for engine in engines.values() if engine is not first)
        second.pause_after = None
        # All that it sent has arrived: what is still on its way when an engine dies is generated again.
        eventually(lambda: served.metric("generation_tokens_total") == PAUSE)
        served.kill(first)
        rest = list(events)
    assert text_of(begun + rest) == ANSWER
    resumed, original = second.submitted[0], first.submitted[0]
    assert resumed.generated_ids == tuple(first.answer[:PAUSE])
    assert (resumed.request_id, resumed.seed, resumed.prompt_ids) == (
        original.request_id,
        original.seed,
        original.prompt_ids,
    )
    assert resumed.max_new_tokens == original.max_new_tokens
    assert rest[-2]["usage"]["completion_tokens"] == len(first.answer)


def test_a_request_that_fails_engine_after_engine_ends_after_two_failovers(serve, new_engine):
    engines = [new_engine(name) for name in "abcde"]
    for engine in engines:
        engine.refusal = {"error": "the rank died", "error_kind": "engine"}
    response = serve(*engines).complete()
    assert response.status_code == 503
    assert sum(len(engine.submitted) for engine in engines) == 3


def test_an_engine_without_room_passes_a_request_on(serve, new_engine):
    engines = [new_engine(name) for name in "ab"]
    served = serve(*engines)
    engines[0].refusal = engines[1].refusal = {"error": "64 are waiting", "error_kind": "overloaded"}
    full = served.complete()
    assert (full.status_code, full.json()["error"]["code"]) == (503, "overloaded")
    assert "retry-after" in full.headers
    engines[1].refusal = None
    assert served.complete().json()["choices"][0]["text"] == ANSWER


def test_what_an_engine_refuses_is_the_clients_to_mend(served, engine):
    engine.refusal = {"error": "the KV cache of 64 tokens is too small", "error_kind": "request"}
    response = served.complete()
    assert response.status_code == 400
    assert "KV cache" in response.json()["error"]["message"]


def test_an_engine_that_fails_on_a_request_is_a_500_in_its_words(served, engine):
    engine.refusal = {"error": "logits are not finite"}
    response = served.complete()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")


def test_a_deadline_kept_by_the_engine_is_a_504(served, engine):
    engine.finish = "deadline"
    assert served.complete().status_code == 504


def test_a_deadline_that_the_engine_misses_is_kept_by_the_router(serve, engine, monkeypatch):
    monkeypatch.setattr("cluster.api.generation.DEADLINE_GRACE_S", 0.05)
    engine.pause_after = PAUSE
    served = serve(engine, request_timeout_s=0.2)
    began = time.monotonic()
    with streaming(served) as events:
        last = list(events)[-1]
    assert last["error"]["code"] == "deadline_exceeded"
    assert time.monotonic() - began < 3
    eventually(lambda: len(engine.aborted) == 1)
    assert engine.submitted[0].deadline is not None


def test_over_the_limit_a_request_is_turned_away_until_another_ends(serve, engine):
    served = serve(engine, max_in_flight=2, retry_after_s=3)
    engine.pause_after = PAUSE
    with streaming(served, n=2) as events:
        next(events)
        response = served.complete()
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert "the limit is 2" in response.json()["error"]["message"]
    eventually(lambda: len(engine.aborted) == 2)
    engine.pause_after = None
    assert eventually(lambda: (r := served.complete()).status_code == 200 and r).json()["choices"][0]["text"] == ANSWER


def test_without_any_engine_a_request_is_a_503(serve):
    response = serve().complete()
    assert response.status_code == 503
    assert "no engine" in response.json()["error"]["message"]
