"""Everything a client can get wrong: an answer in OpenAI's shape that names the field, and a server that goes on."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from cluster.api.body import HARMLESS, UNSUPPORTED
from cluster.api.tokens import Tokens
from tests.cluster.api.fake_engine import FakeEngine
from tests.cluster.api.harness import MODEL, Served, make_served

USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def served(loop, target, answer_ids):
    """One router for all: nothing here may hurt it."""
    running = make_served(loop, Tokens.load(target), [FakeEngine("one", answer_ids, 2)])

    running.start()
    yield running
    running.stop()


def refused(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The message of an error in OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert "Traceback" not in response.text
    return error["message"]


def complete(served: Served, **fields: Any) -> httpx.Response:
    return served.post("/v1/completions", {"model": MODEL, "prompt": "a", **fields})


def chat(served: Served, **fields: Any) -> httpx.Response:
    return served.post("/v1/chat/completions", {"model": MODEL, "messages": [USER], **fields})


COMPLETIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    # name: (fields, param, part of the message)
    "empty text": ({"prompt": ""}, "prompt", "is empty"),
    "empty list": ({"prompt": []}, "prompt", "is empty"),
    "empty text in a list": ({"prompt": ["a", ""]}, "prompt", "[1] is empty"),
    "empty ids in a list": ({"prompt": [[1], []]}, "prompt", "[1] is empty"),
    "no prompt": ({"prompt": None}, "prompt", "required"),
    "prompt of a wrong type": ({"prompt": 5}, "prompt", "a text or a list of token ids"),
    "mixed prompt": ({"prompt": ["a", 5]}, "prompt", "[1] must be"),
    "prompt of real numbers": ({"prompt": [1, 2.5]}, "prompt", "a text or a list of token ids"),
    "prompt of booleans": ({"prompt": [True]}, "prompt", "a text or a list of token ids"),
    "negative token id": ({"prompt": [1, -1]}, "prompt", "token id -1, outside 0..399"),
    "token id beyond the vocabulary": ({"prompt": [400]}, "prompt", "token id 400, outside 0..399"),
    "enormous token id": ({"prompt": [1 << 70]}, "prompt", "outside 0..399"),
    "prompt beyond the context": ({"prompt": [1] * 300}, "prompt", "has 300 tokens, but the model's context is 256"),
    "prompt that fills the context": ({"prompt": [1] * 256}, "prompt", "at least one has to be left"),
    "negative max_tokens": ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1 (got -1)"),
    "max_tokens of zero": ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    "max_tokens as text": ({"max_tokens": "5"}, "max_tokens", "valid integer (got '5')"),
    "max_tokens beyond the context": ({"max_tokens": 256}, "max_tokens", "ask for at most 255"),
    "min_tokens above max_tokens": ({"max_tokens": 3, "min_tokens": 4}, "min_tokens", "limit of 3"),
    "temperature too high": ({"temperature": 2.5}, "temperature", "less than or equal to 2 (got 2.5)"),
    "negative temperature": ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    "top_p of zero": ({"top_p": 0}, "top_p", "greater than 0"),
    "negative top_k": ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    "top_k beyond 31 bits": ({"top_k": 1 << 31}, "top_k", "less than 2147483648"),
    "top_k beyond 64 bits": ({"top_k": 1 << 64}, "top_k", "less than 2147483648"),
    "stop token id beyond 64 bits": ({"stop_token_ids": [1, 1 << 64]}, "stop_token_ids[1]", "less than 2147483648"),
    "five stop strings": ({"stop": list("abcde")}, "stop", "5 strings; at most 4"),
    "an empty stop string": ({"stop": ["a", ""]}, "stop", "1 to 1024 characters"),
    "stop of a wrong type": ({"stop": 5}, "stop", "a string or a list"),
    "n of zero": ({"n": 0}, "n", "greater than or equal to 1"),
    "too many choices": ({"n": 100, "prompt": ["a", "b"]}, "n", "at most 128"),
    "stream as text": ({"stream": "yes"}, "stream", "valid boolean"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    "unknown stream option": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not known"),
    "logprobs beyond the limit": ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    "echo with logprobs": ({"echo": True, "logprobs": 1}, "logprobs", "leave out echo or logprobs"),
    "seed beyond 64 bits": ({"seed": 1 << 63}, "seed", "less than"),
    "unknown field": ({"max_token": 5}, "max_token", "did you mean max_tokens?"),
    "field of the other endpoint": ({"messages": [USER]}, "messages", "not a field"),
    "contradicting draft limits": (
        {"max_draft_tokens": 1, "speculation": {"max_draft_tokens": 2}},
        "max_draft_tokens",
        "differ",
    ),
    "negative draft limit": (
        {"speculation": {"max_draft_tokens": -1}},
        "speculation.max_draft_tokens",
        "or equal to 0",
    ),
    "model of a wrong type": ({"model": 5}, "model", "valid string (got 5)"),
    "no model": ({"model": None}, "model", "required"),
    "best_of above n": ({"best_of": 3, "n": 2}, "best_of", "not supported"),
    "a bias of no token id": ({"logit_bias": {"x": 10}}, "logit_bias", "'x', which is no token id"),
    "a bias of a token beyond the vocabulary": ({"logit_bias": {"400": 1}}, "logit_bias", "400, outside 0..399"),
    "too large a bias": ({"logit_bias": {"5": 101}}, "logit_bias", "-100..100 (got 101)"),
    "a bias that is no number": ({"logit_bias": {"5": "a"}}, "logit_bias", "got a"),
    "too many biases": ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024"),
    "a list of biases": ({"logit_bias": [1]}, "logit_bias", "must be an object"),
    "stop token id beyond the vocabulary": ({"stop_token_ids": [400]}, "stop_token_ids", "400, outside 0..399"),
    "min_p above 1": ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    "repetition_penalty of zero": ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    "a broken regex": ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs.regex", "unclosed group"),
    "an unknown type in a schema": (
        {"structured_outputs": {"json": {"type": "intger"}}},
        "structured_outputs.json",
        "intger",
    ),
    "a schema that is no JSON": (
        {"structured_outputs": {"json": "{"}},
        "structured_outputs.json",
        "cannot be compiled",
    ),
    "a grammar that is none": ({"structured_outputs": {"grammar": "::="}}, "structured_outputs.grammar", "grammar"),
    "an undefined rule": ({"structured_outputs": {"grammar": "start: b"}}, "structured_outputs.grammar", '"b"'),
    "no structure": ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    "two structures": ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of"),
    "an empty choice": ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
    "too long a regex": (
        {"structured_outputs": {"regex": "a" * 200_000}},
        "structured_outputs.regex",
        "at most 131072",
    ),
    "a schema that is too large": (
        {"structured_outputs": {"json": {"allOf": [{"anyOf": [{"const": i} for i in range(99)]}] * 9}}},
        "structured_outputs.json",
        "schema too large",
    ),
    "both forms of structure": (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "give one of them",
    ),
    "an old form of structure": ({"guided_json": {"type": "object"}}, "guided_json", "use structured_outputs"),
    "suffix": ({"suffix": "x"}, "suffix", "not supported"),
    "presence_penalty": ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2 (got 2.5)"),
}

CHATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a schema without its type": (
        {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
        "response_format",
        "if, and only if",
    ),
    "an unknown response format": ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
    "a response format without its schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema",
        "required",
    ),
    "a schema of a wrong type": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format.json_schema.schema",
        "Invalid type: x",
    ),
    "no messages": ({"messages": []}, "messages", "at least 1 item"),
    "messages of a wrong type": ({"messages": "hello"}, "messages", "valid list"),
    "a message of a wrong type": ({"messages": ["hello"]}, "messages[0]", "valid dictionary"),
    "a role that is unknown": ({"messages": [{"role": "robot"}]}, "messages[0].role", "'system'"),
    "a message without a role": ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "required"),
    "content of a wrong type": ({"messages": [{**USER, "content": 5}]}, "messages[0].content", "must be a string"),
    "an image": (
        {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "only text is supported",
    ),
    "tool calls": ({"messages": [{**USER, "tool_calls": []}]}, "messages[0].tool_calls", "not known"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    "a limit beyond the context": ({"max_completion_tokens": 999}, "max_completion_tokens", "ask for at most"),
    "two limits that differ": ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
    "chat beyond the context": (
        {"messages": [{**USER, "content": "x y " * 200}]},
        "messages",
        "the model's context is 256 tokens",
    ),
    "prompt": ({"prompt": "x"}, "prompt", "not a field"),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_wrong_completion_is_told_its_field(served, name):
    fields, param, message = COMPLETIONS[name]
    assert message in refused(complete(served, **fields), 400, param)


@pytest.mark.parametrize("name", CHATS)
def test_a_wrong_chat_is_told_its_field(served, name):
    fields, param, message = CHATS[name]
    assert message in refused(chat(served, **fields), 400, param)


def test_a_wrong_streamed_request_is_refused_before_the_stream(served):
    refused(complete(served, stream=True, max_tokens=-1), 400, "max_tokens")


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_an_unsupported_field_is_named(served, field):
    assert field in refused(chat(served, **{field: {"something": 1}}), 400, field)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model_is_not_found(served, path):
    start = {"prompt": "a"} if path == "/v1/completions" else {"messages": [USER]}
    response = served.post(path, {"model": "another", **start})
    assert "'another' does not exist; this server has tiny" in refused(response, 404, "model")
    assert response.json()["error"]["code"] == "model_not_found"


def test_an_unknown_model_is_not_found_in_the_list(served):
    refused(served.get("/v1/models/org/another"), 404, "model")


BODIES = {
    "nothing": b"",
    "half an object": b'{"model": ',
    "no json": b"hello",
    "not utf-8": b'{"model": "\xff"}',
    "a list": b"[1]",
    "null": b"null",
    "infinity": b'{"model": "tiny", "prompt": "a", "temperature": Infinity}',
    "a deep nest": b"[" * 100_000,
    "half a surrogate": b'{"model": "tiny", "prompt": "\\ud800"}',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_json_object_is_refused(served, name):
    assert "JSON" in refused(served.post("/v1/completions", content=BODIES[name]), 400)


def test_a_number_too_large_to_be_one_is_refused(served):
    body = b'{"model": "tiny", "prompt": "a", "temperature": 1e999}'
    refused(served.post("/v1/completions", content=body), 400, "temperature")


def test_nulls_are_as_if_absent_and_harmless_fields_pass(served):
    nothing = dict.fromkeys(["max_tokens", "stop", "seed", "logprobs", "logit_bias", "stream", "n", "colour"])
    assert complete(served, **nothing).status_code == 200
    assert complete(served, **dict.fromkeys(HARMLESS, "x")).status_code == 200
    message = {**USER, "name": None, "tool_calls": None, "refusal": None}
    assert chat(served, messages=[message], tools=None, response_format={"type": "text"}).status_code == 200


def test_fields_that_ask_for_nothing_pass(served):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 2, "n": 2, "suffix": ""}
    assert complete(served, **neutral).status_code == 200
    assert chat(served, tools=[], tool_choice="auto", modalities=["text"]).status_code == 200


def test_text_parts_are_one_message(served):
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(served, messages=[{"role": "developer", "content": content}]).status_code == 200


def test_a_body_needs_no_content_type(served):
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    response = served.post("/v1/completions", content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 200


def test_an_unknown_path_is_told_where_the_api_is(served):
    assert "/v2/completions" in refused(served.post("/v2/completions", {}), 404)


def test_a_wrong_method_is_told(served):
    assert "does not take GET" in refused(served.get("/v1/completions"), 405)


def test_a_long_body_is_refused_by_its_announced_length(serve, engine):
    small = serve(engine, max_body_bytes=2000)
    assert "2000 bytes" in refused(small.complete(prompt="x" * 3000), 413)


def test_a_long_body_is_refused_while_it_arrives(serve, engine):
    small = serve(engine, max_body_bytes=2000)
    refused(small.post("/v1/completions", content=iter([b" " * 1500] * 2)), 413)


def test_a_body_that_does_not_arrive_is_given_up(serve, engine):
    impatient = serve(engine, body_timeout_s=0.05)
    host, port = impatient.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        assert client.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_request_id_comes_back_and_a_bad_one_is_replaced(served):
    ids = [
        served.get("/v1/models", headers={"X-Request-Id": given}).headers["x-request-id"] for given in ("abc", "a b")
    ]
    assert ids[0] == "abc"
    assert ids[1] not in ("", "a b")


def test_an_unforeseen_failure_tells_the_client_nothing(serve, engine, monkeypatch):
    served = serve(engine)
    monkeypatch.setattr(served.core, "plan", lambda *_: 1 / 0)
    message = refused(served.complete(), 500)
    assert "internal error" in message
    assert "division" not in message
