"""The official client, unchanged, against the router."""

from __future__ import annotations

import asyncio
import json

import openai
import pydantic
import pytest

from cluster.contracts import GrammarSpec
from tests.cluster.api.conftest import ANSWER
from tests.cluster.api.harness import MODEL

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


def test_a_completion_is_the_engines_text_with_its_usage(served, engine, answer_ids):
    answer = served.client().completions.create(model=MODEL, prompt="def f", max_tokens=200)
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(engine.submitted[0].prompt_ids)
    assert answer.usage.completion_tokens == len(answer_ids) + 1
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 0
    assert details.rejected_prediction_tokens > 0


def test_a_streamed_completion_adds_up_to_the_whole_one(served):
    stream = served.client().completions.create(
        model=MODEL, prompt="def f", max_tokens=200, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_chat_completion_renders_the_template(served, engine, tokens):
    answer = served.client().chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=200)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    prompt = tokens.tokenizer.decode(engine.submitted[0].prompt_ids, skip_special_tokens=False)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == expected
    assert engine.submitted[0].prompt_ids[0] == 1


def test_a_streamed_chat_completion_begins_with_the_role(served):
    stream = served.client().chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, seed=1)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_async_client_streams_and_does_not(served):
    async def both() -> tuple[str, str]:
        async with served.async_client() as client:
            whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
            stream = await client.completions.create(model=MODEL, prompt="def f", max_tokens=200, stream=True)
            return whole.choices[0].message.content, "".join([c.choices[0].text async for c in stream])

    assert asyncio.run(both()) == (ANSWER, ANSWER)


def test_n_choices_of_several_prompts_come_back_in_order(served, engine):
    answer = served.client().completions.create(model=MODEL, prompt=["a", "b"], n=2, max_tokens=200, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {ANSWER}
    assert sorted(request.choice for request in engine.submitted) == [0, 0, 1, 1]
    assert len({(request.request_id, request.choice) for request in engine.submitted}) == 4
    assert {request.seed for request in engine.submitted} == {5}
    assert answer.usage.prompt_tokens == 2


def test_streamed_choices_each_add_up(served):
    stream = served.client().chat.completions.create(model=MODEL, messages=MESSAGES, n=3, stream=True)
    texts = {0: "", 1: "", 2: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(texts.values()) == {ANSWER}


def test_a_prompt_may_be_token_ids(served, engine):
    served.client().completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=3)
    assert engine.submitted[0].prompt_ids == (5, 6, 7)


def test_prompts_may_be_several_lists_of_token_ids(served, engine):
    served.client().completions.create(model=MODEL, prompt=[[5, 6], [7]], max_tokens=3)
    assert {request.prompt_ids for request in engine.submitted} == {(5, 6), (7,)}


def test_max_tokens_ends_with_length(served, engine, tokens, answer_ids):
    answer = served.client().completions.create(model=MODEL, prompt="a", max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == tokens.decode(answer_ids[:3])
    assert answer.usage.completion_tokens == 3


def test_sampling_fields_reach_the_engine(served, engine):
    extra = {"top_k": 7, "min_tokens": 2, "speculation": {"max_draft_tokens": 0}}
    served.client().completions.create(
        model=MODEL, prompt="a", temperature=0.5, top_p=0.9, seed=-1, max_tokens=9, extra_body=extra
    )
    request = engine.submitted[0]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.9, 7)
    assert (request.min_new_tokens, request.max_new_tokens, request.max_draft_tokens) == (2, 9, 0)
    assert 0 <= request.seed < 1 << 63
    assert request.stop_token_ids == {2}


def test_penalties_biases_and_min_p_reach_the_engine(served, engine):
    served.client().chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"7": -100, "9": 2},
        extra_body={"min_p": 0.1, "repetition_penalty": 1.2},
    )
    sampling = engine.submitted[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -1, 1.2)
    assert (sampling.min_p, sampling.logit_bias) == (0.1, ((7, -100.0), (9, 2.0)))


SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"enum": ["x"]}}, "required": ["z"]}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            GrammarSpec("json_schema", json.dumps(SCHEMA)),
        ),
        ({"response_format": {"type": "json_object"}}, GrammarSpec("json_schema", '{"type": "object"}')),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json": SCHEMA}}, GrammarSpec("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, GrammarSpec("json_schema", json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "[0-9]+"}}, GrammarSpec("regex", "[0-9]+")),
        ({"structured_outputs": {"choice": ["ja", 'n"ein']}}, GrammarSpec("lark", 'start: "ja" | "n\\"ein"')),
        ({"structured_outputs": {"grammar": 'start: "a"+'}}, GrammarSpec("lark", 'start: "a"+')),
        ({"structured_outputs": {"json_object": True}}, GrammarSpec("json_schema", '{"type": "object"}')),
    ],
)
def test_what_the_output_has_to_be_reaches_the_engine_as_a_grammar(served, engine, fields, grammar):
    client = served.client()
    client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=fields, n=2)
    client.completions.create(model=MODEL, prompt="a", extra_body=fields)
    assert [request.grammar for request in engine.submitted] == [grammar] * 3


def test_a_pydantic_model_is_a_response_format(served, engine):
    class Point(pydantic.BaseModel):
        x: int

    with pytest.raises(pydantic.ValidationError):  # the scripted engine says something else
        served.client().chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Point)
    assert json.loads(engine.submitted[0].grammar.text)["properties"]["x"]["type"] == "integer"


def test_choices_share_a_seed_and_differ_by_their_number(served, engine):
    served.client().completions.create(model=MODEL, prompt="a", n=3, seed=5)
    assert [(request.seed, request.choice) for request in engine.submitted] == [(5, 0), (5, 1), (5, 2)]


def test_ends_of_generation_are_the_clients_to_choose(served, engine, answer_ids):
    extra = {"ignore_eos": True, "stop_token_ids": [answer_ids[4]]}
    answer = served.client().completions.create(model=MODEL, prompt="a", max_tokens=50, extra_body=extra)
    assert engine.submitted[0].stop_token_ids == {answer_ids[4]}
    assert answer.choices[0].finish_reason == "stop"


def test_usage_tells_how_much_of_a_prompt_was_cached_before_its_first_choice(served, engine):
    engine.cached = (3, 7)
    answer = served.client().completions.create(model=MODEL, prompt="def f", n=2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    answer = served.client().chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_usage_may_be_told_all_along(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = served.client().completions.create(model=MODEL, prompt="a", stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1]


def test_template_variables_reach_the_template(served, engine):
    extra = {"chat_template_kwargs": {"add_generation_prompt": False}}
    for body in ({}, extra):
        served.client().chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=body)
    with_prompt, without = (len(request.prompt_ids) for request in engine.submitted)
    assert without < with_prompt


def test_each_request_without_a_seed_gets_its_own(served, engine):
    for _ in range(2):
        served.client().completions.create(model=MODEL, prompt="a")
    assert engine.submitted[0].seed != engine.submitted[1].seed


def test_logprobs_of_a_completion_line_up_with_its_text(served):
    answer = served.client().completions.create(model=MODEL, prompt="a", max_tokens=4, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs == [-0.5] * 4
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 4
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])


def test_streamed_chat_logprobs_carry_each_tokens_exact_bytes(served, answer_ids):
    stream = served.client().chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1, stream=True
    )
    logged = [token for chunk in stream if (own := chunk.choices[0].logprobs) for token in own.content]
    assert len(logged) == len(answer_ids)
    assert bytes(byte for token in logged for byte in token.bytes).decode() == ANSWER
    assert all(len(token.top_logprobs) == 1 for token in logged)


def test_echo_puts_the_prompt_before_the_text(served):
    whole = served.client().completions.create(model=MODEL, prompt="def f", max_tokens=200, echo=True)
    stream = served.client().completions.create(model=MODEL, prompt="def f", max_tokens=200, echo=True, stream=True)
    assert whole.choices[0].text == "def f" + ANSWER
    assert "".join(chunk.choices[0].text for chunk in stream) == "def f" + ANSWER


def test_models_are_listed_with_their_aliases(serve, engine):
    client = serve(engine, aliases=("org/alias",)).client()
    assert [model.id for model in client.models.list()] == [MODEL, "org/alias"]
    assert client.models.retrieve("org/alias").model_extra["max_model_len"] == engine.info.max_context
    assert client.completions.create(model="org/alias", prompt="a").model == "org/alias"


def test_a_key_is_asked_for_where_keys_are_set(serve, engine):
    served = serve(engine, api_keys=("secret", "other"))
    with pytest.raises(openai.AuthenticationError, match="API key"):
        served.client(api_key="wrong").models.list()
    served.client(api_key="secret").completions.create(model=MODEL, prompt="a")
    served.client(api_key="other").completions.create(model=MODEL, prompt="a")
    salts = [request.cache_salt for request in engine.submitted]
    assert salts[0] != salts[1]
    assert "secret" not in salts[0]
    assert served.get("/health").status_code == 200
