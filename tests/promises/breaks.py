"""Each promise broken on purpose: one small change to the code, and the tests that have to fail with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """promise: of PROMISES; claim: the part of it that goes. In `file`, `sound` (which stands there once) becomes
    `broken`; then each of `tests` fails.
    """

    name: str
    promise: int
    claim: str
    file: str
    sound: str
    broken: str
    tests: tuple[str, ...]


PROMISES = {
    1: "Output is the target's own: greedy text equals transformers' greedy generation, seeded text is the same with "
    "drafting on, off and killed, whatever the batch, the ranks, k, preemption and fail-over.",
    2: "A drafter's death, stall or garbage never fails or changes a request; nor does a verifier replica's death "
    "while another lives.",
    3: "Throughput is never below plain decoding's by more than 2% (on two shared cores: 5%).",
    4: "Memory is bounded: over a limit a request gets a clear 4xx or 503 with Retry-After.",
    5: "Tenants do not see each other through the prefix cache; nothing is loaded from a hub, no remote code is run.",
}

ENGINE = "tests/verifier_service/test_engine.py::"
STREAMS = "tests/cluster/api/test_streams.py::"

BREAKS = (
    Break(
        "any-draft-stands",
        1,
        "a draft stands only while it equals the target's own token",
        "verifier_service/acceptance.py",
        "if draft != samples[first + count]:",
        "if draft < 0:",
        (
            "tests/verifier_service/test_acceptance.py::test_drafts_stand_as_long_as_they_equal_the_targets_own_samples",
            ENGINE + "test_greedy_text_is_the_models_own_with_any_drafts_and_under_preemption",
            ENGINE + "test_sampled_text_is_the_same_with_and_without_drafts",
        ),
    ),
    Break(
        "rejected-tokens-stay-in-the-state",
        1,
        "a recurrent state takes in the accepted tokens and no other",
        "verifier_service/scheduler.py",
        "        kept = accepted + 1\n",
        "        kept = len(ids)\n",
        (ENGINE + "test_greedy_text_is_the_models_own_with_any_drafts_and_under_preemption",),
    ),
    Break(
        "noise-of-the-row",
        1,
        "random numbers are keyed by seed, choice and absolute position, whatever is drafted",
        "verifier_service/sampling/race.py",
        "return _mix(keys + (positions + 1) * _GOLDEN)",
        "return _mix(keys + torch.arange(1, len(keys) + 1) * _GOLDEN)",
        (
            "tests/verifier_service/test_real_model.py::test_seeded_output_is_the_same_with_drafts_and_without",
            "tests/verifier_service/test_sampling.py::test_a_sample_depends_on_its_own_row_alone",
        ),
    ),
    Break(
        "noise-of-another-shape",
        1,
        "sampled tokens follow the target's own distribution",
        "verifier_service/sampling/race.py",
        "uniform(keys[:, None], ids).log_().neg_().log_()",
        "uniform(keys[:, None], ids).log_().neg_()",
        ("tests/verifier_service/test_sampling.py::test_samples_follow_the_softmax",),
    ),
    Break(
        "sums-in-the-order-of-the-ranks",
        1,
        "in deterministic mode a token's bits depend on neither the batch nor the ranks",
        "modeling/tiles.py",
        "parts = parts[0::2] + parts[1::2]",
        "parts = parts[1:2] + torch.cat([parts[:1], parts[2:]]) if len(parts) == 8 else parts[0::2] + parts[1::2]",
        ("tests/modeling/test_tiles.py",),
    ),
    Break(
        "products-of-the-whole-batch",
        1,
        "in deterministic mode a token's bits do not depend on the batch",
        "modeling/tiles.py",
        "x = _padded(x, ROWS).contiguous()\n",
        "return x @ tiles.flatten(1, 2).mT\n",
        ("tests/verifier_service/test_deterministic.py::test_a_batch_says_what_each_request_says_alone",),
    ),
    Break(
        "preempted-output-is-lost",
        1,
        "preemption changes no text",
        "verifier_service/seats.py",
        "        sequence.drafts = ()\n        self.queue(sequence)",
        "        sequence.drafts = ()\n        del sequence.tokens[-1:]\n        self.queue(sequence)",
        (ENGINE + "test_greedy_text_is_the_models_own_with_any_drafts_and_under_preemption",),
    ),
    Break(
        "fail-over-begins-again",
        1,
        "a request that is taken over goes on from its tokens",
        "cluster/api/generation.py",
        "replace(request, generated_ids=tuple(text.generated_ids))",
        "request",
        (STREAMS + "test_another_engine_continues_the_text",),
    ),
    Break(
        "unguarded-proposer",
        2,
        "whatever fails in drafting costs drafts and nothing else",
        "verifier_service/drafting.py",
        "        except Exception:\n            log.exception",
        "        except ZeroDivisionError:\n            log.exception",
        (ENGINE + "test_a_failing_proposer_costs_drafts_and_nothing_else",),
    ),
    Break(
        "endless-patience",
        2,
        "a drafter that answers late is asked less and less often",
        "verifier_service/proposers/patience.py",
        "self._asks_from = now + ",
        "self._asks_from = now - ",
        ("tests/verifier_service/test_patience.py::test_a_drafter_that_is_often_late_costs_little_in_the_long_run",),
    ),
    Break(
        "unchecked-answers",
        2,
        "a drafter's garbage reaches nobody",
        "cluster/link/answers.py",
        "if not self._is_valid(answer, ask):",
        "if False:",
        ("tests/cluster/link/test_answers.py::test_an_answer_that_cannot_be_is_handed_out_empty",),
    ),
    Break(
        "waits-for-the-dead",
        2,
        "a drafter's death ends the wait for its drafts",
        "cluster/link/answers.py",
        "            self._unshared.clear()\n            self._changed.notify_all()",
        "            self._unshared.clear()",
        ("tests/cluster/link/test_answers.py::test_the_end_of_an_epoch_ends_the_wait",),
    ),
    Break(
        "fail-over-without-end",
        2,
        "a request that kills replica after replica ends after two fail-overs",
        "cluster/api/generation.py",
        "if route.losses > self._max_failovers:",
        "if route.losses < 0:",
        (STREAMS + "test_a_request_that_fails_engine_after_engine_ends_after_two_failovers",),
    ),
    Break(
        "no-failover",
        2,
        "a replica's death changes no request while another lives",
        "cluster/api/generation.py",
        "if route.losses > self._max_failovers:",
        "if route.losses > 0:",
        (STREAMS + "test_another_engine_continues_the_text",),
    ),
    Break(
        "drafting-at-any-price",
        3,
        "plain decoding is chosen where drafts do not pay",
        "verifier_service/control.py",
        "START, STAY = 1.05, 1.01",
        "START, STAY = 0.0, 0.0",
        ("tests/verifier_service/test_control.py::test_a_probe_is_short_asks_few_and_rests_longer_each_time_it_loses",),
    ),
    Break(
        "no-account-of-losses",
        3,
        "what drafting may lose is bounded, whatever the estimates say",
        "verifier_service/allowance.py",
        "SHARE = 0.01",
        "SHARE = 0.5",
        (
            "tests/verifier_service/test_control_scenarios.py"
            "::test_in_the_long_run_no_drafter_costs_more_than_two_percent",
        ),
    ),
    Break(
        "endless-queue",
        4,
        "a full queue refuses by its limit",
        "verifier_service/scheduler.py",
        ">= self.limits.max_waiting:",
        "< 0:",
        (
            "tests/verifier_service/test_scheduler.py::test_a_full_queue_refuses_with_its_limit",
            ENGINE + "test_a_full_queue_says_overloaded",
        ),
    ),
    Break(
        "endless-features",
        4,
        "all features together stay within feature_store_bytes",
        "verifier_service/feature_pages.py",
        "if len(largest.pages) < 2:",
        "if True:",
        ("tests/verifier_service/test_features.py::test_over_the_bound_the_longest_request_loses_its_older_half",),
    ),
    Break(
        "endless-inbox",
        4,
        "a drafter's queue is bounded, and answers at once",
        "drafter_service/inbox.py",
        "if self.asks >= self._max_asks:",
        "if False:",
        ("tests/drafter_service/test_engine_hostile.py::test_asks_beyond_the_queue_are_answered_empty_at_once",),
    ),
    Break(
        "endless-router",
        4,
        "over max_in_flight a request gets 503 with Retry-After",
        "cluster/api/router.py",
        "if self._in_flight + count > limit:",
        "if self._in_flight + count < 0:",
        (STREAMS + "test_over_the_limit_a_request_is_turned_away_until_another_ends",),
    ),
    Break(
        "one-salt-for-all",
        5,
        "another tenant finds nothing in the prefix cache",
        "verifier_service/block_hashes.py",
        "else root_of(salt)",
        'else root_of("")',
        (
            "tests/verifier_service/test_scheduler.py::test_tenants_find_nothing_of_each_other",
            "tests/verifier_service/test_prefix_hits.py::test_another_tenant_hits_nothing",
        ),
    ),
    Break(
        "remote-code",
        5,
        "code that lies in a checkpoint is not run",
        "verifier_service/model/touchpoints.py",
        "trust_remote_code=False",
        "trust_remote_code=True",
        ("tests/promises/test_nothing_foreign.py::test_code_in_a_checkpoint_is_not_run",),
    ),
    Break(
        "from-the-hub",
        5,
        "nothing is asked of a hub",
        "verifier_service/model/touchpoints.py",
        "AutoConfig.from_pretrained(target.directory, local_files_only=True,",
        "AutoConfig.from_pretrained(str(target.directory).replace('/', '_')[-20:],",
        ("tests/promises/test_nothing_foreign.py::test_no_name_is_looked_up_while_a_pair_is_loaded",),
    ),
)
