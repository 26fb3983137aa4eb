"""The prefill budget is spent, nobody gets more than it needs, and neither long nor short prompts starve."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from verifier_service.prefill_shares import Prompt, prefill_shares

prompts = st.lists(st.builds(Prompt, st.integers(0, 2), st.integers(1, 300)), min_size=1, max_size=8).map(
    lambda held: sorted(held, key=lambda prompt: prompt.priority)
)


@settings(deadline=None)
@given(prompts, st.integers(1, 200))
def test_the_budget_is_spent_where_it_is_needed(held: list[Prompt], budget: int):
    shares = prefill_shares(held, budget)
    assert sum(shares) == min(budget, sum(prompt.remaining for prompt in held))
    assert all(0 <= share <= prompt.remaining for share, prompt in zip(shares, held))


@settings(deadline=None)
@given(prompts, st.integers(1, 200))
def test_the_first_in_order_gets_half_and_the_nearest_its_end_the_other_half(held: list[Prompt], budget: int):
    shares = prefill_shares(held, budget)
    assert shares[0] >= min(held[0].remaining, budget - budget // 2)
    first = [i for i, prompt in enumerate(held) if prompt.priority == held[0].priority]
    nearest = min(first, key=lambda i: held[i].remaining)
    assert shares[nearest] >= min(held[nearest].remaining, budget // 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 64), st.lists(st.integers(1, 120), min_size=1, max_size=6), st.integers(1, 8))
def test_every_prompt_ends_within_its_bound_whatever_comes_after_it(budget: int, lengths: list[int], newcomer: int):
    """All that came before it, and itself, at half of the budget a step."""
    remaining = dict(enumerate(lengths))
    bound, before = {}, 0
    for i, length in enumerate(lengths):
        before += length
        bound[i] = -(-before // (budget - budget // 2)) + i
    for step in range(max(bound.values()) + 1):
        remaining[len(lengths) + step] = newcomer  # a new, short prompt every step
        order = sorted(remaining)
        shares = prefill_shares([Prompt(0, remaining[i]) for i in order], budget)
        for i, share in zip(order, shares):
            remaining[i] -= share
            if not remaining[i]:
                del remaining[i]
        assert all(i not in remaining for i, steps in bound.items() if step >= steps)
