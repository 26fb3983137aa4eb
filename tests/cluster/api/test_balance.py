from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.api.balance import BLOCK_TOKENS, KEY_BLOCKS, Load, choose, prompt_key

IDLE = [Load(f"engine-{i}", 0, 8) for i in range(4)]
KEYS = [prompt_key((i,) * BLOCK_TOKENS, "") for i in range(400)]


def test_a_prompts_home_is_the_same_whatever_the_order_of_engines():
    assert [choose(IDLE, key) for key in KEYS] == [choose(IDLE[::-1], key) for key in KEYS]


def test_prompts_spread_over_idle_engines():
    counts = Counter(choose(IDLE, key) for key in KEYS)
    assert len(counts) == 4
    assert min(counts.values()) > 50


def test_a_lost_engine_moves_only_its_own_prompts():
    gone = IDLE[0].engine_id
    moved = [key for key in KEYS if choose(IDLE, key) != choose(IDLE[1:], key)]
    assert moved == [key for key in KEYS if choose(IDLE, key) == gone]


def test_prompts_that_begin_alike_share_a_key():
    head = tuple(range(KEY_BLOCKS * BLOCK_TOKENS))
    assert prompt_key((*head, 1), "") == prompt_key((*head, 2, 3), "")
    assert prompt_key((9, *head), "") != prompt_key(head, "")


def test_a_partial_block_does_not_count_beside_a_whole_one():
    block = tuple(range(BLOCK_TOKENS))
    assert prompt_key((*block, 1), "") == prompt_key((*block, 2), "")


def test_short_prompts_differ_by_all_of_their_tokens():
    assert prompt_key((1, 2), "") != prompt_key((1, 3), "")


def test_another_tenants_prompt_has_another_key():
    assert prompt_key((1, 2), "a") != prompt_key((1, 2), "b")


def test_an_engine_over_its_share_passes_prompts_on():
    home = choose(IDLE, KEYS[0])
    busy = [Load(load.engine_id, 8 if load.engine_id == home else 0, 8) for load in IDLE]
    assert choose(busy, KEYS[0]) != home


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=6), st.binary(max_size=8))
def test_no_choice_takes_an_engine_beyond_its_share_by_more_than_slack(loads, key):
    engines = [Load(str(i), in_flight, capacity) for i, (in_flight, capacity) in enumerate(loads)]
    chosen = next(load for load in engines if load.engine_id == choose(engines, key))
    share = (sum(e.in_flight for e in engines) + 1) * chosen.capacity / sum(e.capacity for e in engines)
    assert chosen.in_flight < 1.25 * share + 1


def test_a_stream_of_one_prompt_fills_engines_evenly():
    counts = Counter({load.engine_id: 0 for load in IDLE})
    for _ in range(64):
        counts[choose([Load(engine, n, 8) for engine, n in counts.items()], KEYS[0])] += 1
    assert max(counts.values()) <= 21
