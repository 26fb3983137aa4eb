"""Values that cross from a router to a verifier's engine and back, as msgspec structs: one layout for both ends.

No torch, no Ray. Every message on the engine port is a member of `ToEngine` or `FromEngine`, framed by `cluster.wire`.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class SamplingParams(msgspec.Struct, frozen=True):
    """Applied in this order: logit_bias, repetition, frequency and presence penalty, temperature, top_k, top_p, min_p.
    The defaults change nothing.

    temperature 0 is greedy. top_k 0 and top_p 1.0 mean "off". min_p: least probability, as a share of the best token's.
    presence_penalty, frequency_penalty: taken off the logit of a token that is in the output, once or per occurrence.
    repetition_penalty: divides the logit (multiplies, below 0) of a token that is in the prompt or the output.
    logit_bias: (token id, what is added to its logit). `logprobs`: None, or how many alternatives (0..20).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    logprobs: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


class GrammarSpec(msgspec.Struct, frozen=True):
    """What the output has to be: kind "json_schema", "regex" or "lark", and the text of it. See cluster.grammar."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


class EngineRequest(msgspec.Struct, frozen=True):
    """One generation as an engine takes it. Also the form in which a request resumes elsewhere after a failure.

    request_id: idempotency key, the same across re-submissions. choice: 0..n-1 of the client's n.
    generated_ids: already emitted (resume); context for the model, output for limits, penalties, grammar and usage.
    seed: always set; with (choice, absolute position, token id) it keys every random number.
    grammar: the output follows it, and ends with "stop" where nothing can follow.
    max_new_tokens: in total, generated_ids included. min_new_tokens: so many come before any of stop_token_ids can.
    max_draft_tokens: None = the engine's choice, 0 = plain decoding.
    deadline: unix seconds; past it the request finishes with "deadline".
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    choice: int = 0
    generated_ids: tuple[int, ...] = ()
    sampling: SamplingParams = SamplingParams()
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    grammar: GrammarSpec | None = None
    max_draft_tokens: int | None = None
    priority: int = 0
    deadline: float | None = None
    cache_salt: str = ""
    allow_learning: bool = False


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities of the target at one position, before temperature and truncation.

    `top`: (token id, logprob) of the most probable tokens, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Delta(msgspec.Struct, frozen=True):
    """What one step committed for one request. finish: "stop" | "length" | "abort" | "deadline" | "error".

    A stop token is part of token_ids. accepted: how many of token_ids were drafts; drafted: how many were verified.
    error: for a person; error_kind: who can act: "request" (the client), "overloaded" (later), "engine" (elsewhere).
    cached: prompt tokens that were found in the prefix cache; told with a request's first tokens, 0 afterwards.
    """

    request_id: str
    choice: int
    token_ids: tuple[int, ...]
    accepted: int = 0
    drafted: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: str | None = None
    error: str | None = None
    error_kind: str | None = None
    cached: int = 0


class EngineInfo(msgspec.Struct, frozen=True, tag="info"):
    """First message on every connection: what this engine serves and its limits. Lengths in tokens."""

    engine_id: str
    target_fingerprint: str
    max_context: int
    vocabulary: int
    max_requests: int
    block_size: int


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Start (or resume) a request. Submitting a running (request_id, choice) again is an error Delta."""

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Free a request's resources now. Unknown ids are ignored. The Delta with finish="abort" still comes."""

    request_id: str
    choice: int


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Ask for a Status: the health check and the bench use it."""

    nonce: int = 0


class SetDrafters(msgspec.Struct, frozen=True, tag="set_drafters"):
    """Which drafters this verifier may link to, best first, as "host:port". Replaces the earlier list."""

    addresses: tuple[str, ...]


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """Settings that change without a restart. None leaves a setting as it is."""

    max_draft_tokens: int | None = None
    soft_deadline_s: float | None = None


class Deltas(msgspec.Struct, frozen=True, tag="deltas"):
    """One message per step and router."""

    deltas: tuple[Delta, ...]


class Status(msgspec.Struct, frozen=True, tag="status"):
    """An engine's own account. seconds_since_step: age of the last finished step (heartbeat steps count).

    step_limit_s: the age from which the step under way counts as stuck, by the engine's own measured steps; infinite
    during warm-up.

    draft_seconds: time a step waited for drafts, in total; step_seconds: time in steps, in total.
    """

    nonce: int
    step: int
    seconds_since_step: float
    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    linked: bool
    drafter_id: str
    epoch: int
    counters: dict[str, float]
    step_limit_s: float = float("inf")


ToEngine = Submit | Abort | Probe | SetDrafters | Configure
FromEngine = EngineInfo | Deltas | Status
