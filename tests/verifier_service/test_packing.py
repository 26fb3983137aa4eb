"""Plans survive the trip to the other ranks."""

from __future__ import annotations

import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts import SamplingParams
from verifier_service.packing import FIRST_WORDS, PlanChannel, pack, unpack
from verifier_service.plan import PrefillChunk, RowDraw, ShownRows, StepPlan, VerifyRow

numbers = st.integers(0, 1 << 40)
ids = st.lists(st.integers(0, 300_000), min_size=1, max_size=9).map(tuple)
pairs = st.lists(st.tuples(numbers, numbers), max_size=5).map(tuple)
shares = st.floats(0.0, 1.0)
params = st.builds(
    lambda temperature, top_p, top_k, min_p: SamplingParams(temperature, top_p, top_k, min_p=min_p),
    st.floats(1e-5, 9.0),
    shares,
    numbers,
    shares,
)
seeds = st.integers(-(1 << 63), (1 << 63) - 1)
draws = st.lists(st.builds(RowDraw, numbers, numbers, numbers, seeds, numbers, params), max_size=3).map(tuple)
plans = st.builds(
    StepPlan,
    step=numbers,
    verify=st.lists(st.builds(VerifyRow, numbers, numbers, ids), max_size=5).map(tuple),
    prefill=st.lists(
        st.builds(PrefillChunk, numbers, numbers, ids, st.booleans(), st.integers(-1, 99)), max_size=5
    ).map(tuple),
    new_blocks=pairs,
    released=st.lists(numbers, max_size=5).map(tuple),
    decided=pairs,
    saved=st.lists(st.tuples(numbers, numbers, numbers), max_size=5).map(tuple),
    restored=pairs,
    draws=st.none() | draws,
    shown=st.lists(st.builds(ShownRows, numbers, numbers, st.booleans()), max_size=3).map(tuple),
    ahead=st.booleans(),
    heartbeat=st.booleans(),
    stop=st.booleans(),
)


@settings(deadline=None)
@given(plans, st.integers(0, 5))
def test_a_plan_is_the_same_after_packing(plan: StepPlan, padding: int):
    assert unpack(torch.cat([pack(plan), torch.zeros(padding, dtype=torch.int64)])) == plan


def test_plans_of_any_size_reach_the_other_rank_in_order():
    prompt = tuple(range(FIRST_WORDS))
    sent = [
        StepPlan(1, heartbeat=True),
        StepPlan(2, prefill=(PrefillChunk(0, 0, prompt, True),)),
        StepPlan(3, verify=(VerifyRow(0, len(prompt), (1, 2, 3)),)),
        StepPlan(4, stop=True),
    ]
    store = dist.HashStore()
    received: list[StepPlan] = []

    def rank(number: int) -> None:
        group = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=20))
        channel = PlanChannel(group)  # type: ignore[arg-type]
        for plan in sent:
            if number == 0:
                channel.send(plan)
            else:
                received.append(channel.receive())

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert received == sent
