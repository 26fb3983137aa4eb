"""Through the engine: with any combination of sampling features the text is the same whatever is drafted."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts import EngineRequest, SamplingParams
from tests.verifier_service.fake_runner import ORDER, history_key, table
from tests.verifier_service.oracle import PartlyRight
from tests.verifier_service.test_engine import Inbox, make_engine
from tests.verifier_service.test_processors import by_transformers
from verifier_service.engine import Engine

VOCABULARY = 64
OUTPUT = 12
LOGITS = table(VOCABULARY)

sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.8, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, 4.0]), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
)
mixes = st.lists(
    st.fixed_dictionaries(
        {
            "sampling": sampling,
            "min_new_tokens": st.integers(0, OUTPUT),
            "stop_token_ids": st.frozensets(st.integers(0, VOCABULARY - 1), max_size=20),
        }
    ),
    min_size=4,
    max_size=4,
)


def requests_of(mix: Sequence[Mapping[str, Any]]) -> list[EngineRequest]:
    return [
        EngineRequest(f"r{i}", tuple(random.Random(i).choices(range(VOCABULARY), k=3 + i)), i, OUTPUT, **fields)
        for i, fields in enumerate(mix)
    ]


def texts(requests: Sequence[EngineRequest], known: Mapping[str, Sequence[int]] | None = None) -> dict[str, list[int]]:
    """Of all requests at once; with `known` texts to draft from."""
    proposer = None if known is None else PartlyRight(known, VOCABULARY, seed=len(known))
    engine: Engine = make_engine(proposer=proposer)
    inbox = Inbox()
    for each in requests:
        engine.submit(each, inbox)
    engine.start()
    inbox.wait(*(each.request_id for each in requests))
    engine.stop()
    if known is not None:
        assert engine.status().counters["drafted_tokens"] > 0 or all(len(text) < 3 for text in known.values())
    return {each.request_id: inbox.text(each.request_id) for each in requests}


@settings(max_examples=30, deadline=None)
@given(mixes)
def test_text_is_the_same_with_drafts_and_without_in_any_mix_of_features(mix):
    requests = requests_of(mix)
    plain = texts(requests)
    assert texts(requests, plain) == plain
    for each in requests:
        text = plain[each.request_id]
        assert not each.stop_token_ids.intersection(text[: each.min_new_tokens])


@settings(max_examples=20, deadline=None)
@given(mixes)
def test_a_request_resumed_anywhere_goes_on_with_its_output_as_output(mix):
    requests = requests_of(mix)
    plain = texts(requests)
    cuts = {name: len(text) // 2 for name, text in plain.items()}
    resumed = [
        _resumed(each, plain[each.request_id][: cuts[each.request_id]])
        for each in requests
        if cuts[each.request_id] < len(plain[each.request_id])
    ]
    for name, rest in texts(resumed).items():
        assert plain[name][cuts[name] :] == rest


@settings(max_examples=15, deadline=None)
@given(mixes)
def test_greedy_text_is_what_transformers_processors_give_one_token_at_a_time(mix):
    requests = [
        msgspec.structs.replace(each, sampling=msgspec.structs.replace(each.sampling, temperature=0.0))
        for each in requests_of(mix)
    ]
    expected = {each.request_id: reference(each) for each in requests}
    assert texts(requests, expected) == expected


def reference(asked: EngineRequest) -> list[int]:
    known, output = list(asked.prompt_ids), list[int]()
    while len(output) < OUTPUT:
        own = LOGITS[history_key(known[-ORDER:], len(known) - 1)]
        scores = by_transformers(asked, (), output, own)[0]
        output.append(int(scores.argmax()))
        known.append(output[-1])
        if output[-1] in asked.stop_token_ids and len(output) > asked.min_new_tokens:
            break
    return output


def _resumed(asked: EngineRequest, generated: Sequence[int]) -> EngineRequest:
    return msgspec.structs.replace(asked, generated_ids=tuple(generated))
