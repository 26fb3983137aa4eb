"""Edits of logits and truncation are what transformers' processors do, in every row of a verified block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.contracts import EngineRequest, SamplingParams
from verifier_service.sampling.draw import Draw
from verifier_service.sampling.edits import apply_edits, mask_only
from verifier_service.sampling.sampler import sample
from verifier_service.sampling.token_table import TokenTable

VOCABULARY = 12
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def request(prompt: Sequence[int] = (1,), generated: Sequence[int] = (), least: int = 0, stops=(), **params):
    return EngineRequest(
        "r",
        tuple(prompt),
        1,
        100,
        generated_ids=tuple(generated),
        sampling=SamplingParams(**params),
        min_new_tokens=least,
        stop_token_ids=frozenset(stops),
    )


def edited(asked: EngineRequest, drafts: Sequence[int] = (), later: Sequence[int] = ()) -> torch.Tensor:
    """Logits after its edits; `later`: output that came after the table had been used once."""
    table = TokenTable(asked)
    known = [*asked.prompt_ids, *asked.generated_ids]
    if later:
        table.edits(known, later[:2])
    changed = logits(1 + len(drafts))
    if (edits := table.edits([*known, *later], drafts)) is not None:
        apply_edits(changed, [(0, edits)])
    return changed


def by_transformers(
    asked: EngineRequest, drafts: Sequence[int], later: Sequence[int], own: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row by itself, from its own history. own: the only row's logits, if not the usual ones."""
    params = asked.sampling
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if asked.min_new_tokens and asked.stop_token_ids:
        processors.append(
            MinNewTokensLengthLogitsProcessor(len(asked.prompt_ids), asked.min_new_tokens, list(asked.stop_token_ids))
        )
    rows = []
    for row, before in enumerate(logits(1 + len(drafts)) if own is None else own[None]):
        output = [*asked.generated_ids, *later, *drafts[:row]]
        scores = processors(torch.LongTensor([[*asked.prompt_ids, *output]]), before[None].clone())[0]
        count = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(scores)).float()
        # As OpenAI's reference defines them: https://platform.openai.com/docs/guides/text-generation
        rows.append(scores - count * params.frequency_penalty - (count > 0).float() * params.presence_penalty)
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(
    tokens.filter(bool),
    tokens,
    tokens,
    tokens.map(lambda drafts: drafts[:7]),
    st.sampled_from([0.0, 0.7, -1.5]),
    st.sampled_from([0.0, 0.4, -0.3]),
    st.sampled_from([1.0, 1.3, 0.8]),
    st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -1.0, 2.5]), max_size=4),
    st.integers(0, 30),
    st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2),
)
def test_every_row_of_a_block_is_changed_as_its_own_history_says(
    prompt, generated, later, drafts, presence, frequency, repetition, bias, least, stops
):
    asked = request(
        prompt,
        generated,
        least,
        stops,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
    )
    expected = by_transformers(asked, drafts, later)
    torch.testing.assert_close(edited(asked, drafts, later), expected, rtol=1e-6, atol=1e-5)


def test_a_prompt_counts_for_repetition_and_not_for_presence():
    unchanged = logits(1)
    assert torch.equal(edited(request([3, 4], presence_penalty=1.0, frequency_penalty=1.0)), unchanged)
    changed = edited(request([3, 4], repetition_penalty=2.0))
    assert (changed != unchanged)[0].nonzero()[:, 0].tolist() == [3, 4]


def test_many_distinct_tokens_outgrow_the_tables_first_capacity():
    prompt = list(range(1000))
    table = TokenTable(request(prompt, repetition_penalty=2.0, presence_penalty=0.5))
    edits = table.edits([*prompt, *range(500, 1500)], [1600, 1601])
    assert edits is not None
    assert sorted(edits.ids.tolist()) == [*range(1500), 1600, 1601]
    assert (edits.minus[0] == 0.5).sum() == 1000
    assert (edits.minus[2] == 0.5).sum() == 1002


def test_edits_change_no_other_request_and_leave_the_logits_alone():
    before = logits(6)
    after = before.clone()
    edits = TokenTable(request(logit_bias=((7, 100.0),))).edits([1], [2])
    greedy = sample(before)
    tokens = sample(after, [Draw(2, 2, 0, 1, 0, SamplingParams(), edits), Draw(4, 1, 0, 1, 0, SamplingParams(1e-4))])
    assert tokens == [*greedy[:2], 7, 7, *greedy[4:]]
    assert torch.equal(before, after)


@pytest.mark.parametrize("allowed", [{0}, {3, 11}])
def test_a_bit_mask_leaves_its_tokens_only(allowed: set[int]):
    edits = TokenTable(request(logit_bias=((5, 100.0),))).edits([1], [])
    assert edits is not None
    mask = torch.tensor([[sum(1 << token for token in allowed)]], dtype=torch.int32)
    draws = [Draw(0, 200, 0, 1, 0, SamplingParams(temperature=2.0), _repeated(replace(edits, allowed=mask), 200))]
    assert set(sample(logits(1).expand(200, -1), draws)) == allowed


def _repeated(edits, rows: int):
    times, minus = edits.times.repeat(rows, 0), edits.minus.repeat(rows, 0)
    return replace(edits, times=times, minus=minus, allowed=edits.allowed.expand(rows, -1))


@pytest.mark.parametrize("between", [0, 1])
def test_more_rows_than_are_masked_at_once_keep_each_its_own_tokens(between: int):
    """between: rows without a mask between the two requests."""
    rows, vocabulary = 50, 40
    logits = torch.zeros(2 * rows + between, vocabulary)
    masks = [torch.stack([torch.tensor([1 << row % 31, at]) for row in range(rows)]).int() for at in (1, 2)]
    apply_edits(logits, [(first, mask_only(mask)) for first, mask in zip((0, rows + between), masks)])
    for first, high in ((0, 32), (rows + between, 33)):
        for row in range(rows):
            assert logits[first + row].isfinite().nonzero().flatten().tolist() == [row % 31, high]
    assert logits[rows : rows + between].isfinite().all()


@pytest.mark.parametrize(
    "params",
    [
        {"min_p": 0.1},
        {"min_p": 0.2, "top_k": 5, "temperature": 2.0},
        {"min_p": 0.02, "top_p": 0.9},
        {"min_p": 0.1, "top_p": 0.8, "top_k": 9, "temperature": 2.5},
        {"top_p": 0.7, "temperature": 1.7},
        {"min_p": 0.2, "repetition_penalty": 1.8, "frequency_penalty": 0.5},
    ],
)
def test_samples_follow_the_distribution_after_transformers_processors(params: dict):
    asked = request([2, 4], [0, 1, 1], **{"temperature": 1.0, **params})
    sampling = asked.sampling
    own = by_transformers(asked, (), ())
    for warper in (
        TemperatureLogitsWarper(sampling.temperature),
        TopKLogitsWarper(sampling.top_k) if sampling.top_k else None,
        TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None,
        MinPLogitsWarper(sampling.min_p) if sampling.min_p else None,
    ):
        own = warper(torch.LongTensor(), own) if warper is not None else own
    p = own[0].double().softmax(-1)
    draws = 20_000
    changed = edited(asked)
    drawn = torch.tensor(sample(changed.expand(draws, -1), [Draw(0, draws, 0, 11, 0, sampling)]))
    count = torch.bincount(drawn, minlength=VOCABULARY).double()
    kept = p > 0
    assert count[~kept].sum() == 0
    assert 1 < kept.sum() < VOCABULARY
    chi_square = ((count - p * draws) ** 2 / (p * draws))[kept].sum()
    assert chi_square < 33.1  # at most 11 degrees of freedom, p = 0.0005


@pytest.mark.parametrize("top_k", [0, 400])
def test_min_p_over_many_tokens_is_settled_as_by_a_full_sort(top_k: int):
    many = torch.linspace(1.0, 0.0, 1200)
    params = SamplingParams(1.0, top_k=top_k, min_p=0.8)
    tokens = torch.tensor(sample(many.expand(1500, -1), [Draw(0, 1500, 0, 5, 0, params)]))
    kept = int((many >= many[0] + torch.tensor(0.8).log()).sum())
    assert tokens.max() < kept <= 268
    assert len(tokens.unique()) > 0.9 * kept
