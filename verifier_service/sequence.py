"""One request while the engine holds it. Owned by the engine's thread; the scheduler alone changes where it stands."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import msgspec

from cluster.contracts import EngineRequest
from verifier_service.block_hashes import BlockHash

Key = tuple[str, int]

GREEDY_BELOW = 1e-5  # a temperature below it is 0: scaled logits would lie beyond any random number


def key_of(request: EngineRequest) -> Key:
    return request.request_id, request.choice


@dataclass(slots=True, eq=False)
class RunningRequest:
    """tokens: prompt and all output so far, the bonus token last. computed: how many of them are in the KV cache.

    While decoding, computed == len(tokens) - 1; or len(tokens), while a step that gives it the next token is counted
    but not read: the token then comes from row `awaited` of that step's logits. Before that, the prompt (and what a
    resumed or preempted request had generated) is prefilled. slot -1: waiting, holds no blocks. drafts: to follow
    tokens[-1], set by a proposer.
    order: (priority, arrival): lower goes first. sink: where its Deltas go. shaping: what changes its logits
    before a token is taken; None = nothing. Both are opaque to the scheduler. plain: always the best token as it is.
    longest: what `tokens` can come to. logprobs: how many are told beside each token's own; None: not even that.

    For the prefix cache: hashes of its full blocks, as far as they were needed; named: how many of its blocks can be
    found by them; name_at: computed tokens at which the next one can; cached: tokens that it entered with; splits:
    where its prefill stops for a checkpoint of recurrent state, in order; moving: the hash under which its output's
    checkpoint is kept.
    """

    request: EngineRequest
    order: tuple[int, int]
    sink: Any = None
    shaping: Any = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    awaited: int = -1
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    drafts: tuple[int, ...] = ()
    last_step: int = 0
    hashes: list[BlockHash] = field(default_factory=list)
    named: int = 0
    name_at: int = sys.maxsize
    cached: int = 0
    splits: list[int] = field(default_factory=list)
    moving: BlockHash | None = None
    key: Key = field(init=False)
    prompt_tokens: int = field(init=False)
    longest: int = field(init=False)
    plain: bool = field(init=False)
    logprobs: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.key = key_of(self.request)
        self.prompt_tokens = len(self.request.prompt_ids)
        self.longest = self.prompt_tokens + self.request.max_new_tokens
        self.plain = self.shaping is None and self.request.sampling.temperature < GREEDY_BELOW
        self.logprobs = self.request.sampling.logprobs
        self.tokens = [*self.request.prompt_ids, *self.request.generated_ids]

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def remaining(self) -> int:
        return self.longest - len(self.tokens)


class Progress(msgspec.Struct, eq=False):  # hundreds a step: made in a quarter of a dataclass's time
    """What one step did for one request.

    row: its first token row in the step; kept rows from there are now in the KV cache, at positions start.. .
    logit_row: row of the logits that token_ids[0] was sampled from. token_ids: new output (none in a prefill that goes
    on). drafted: how many drafts were verified; matched: how many of them the target would have said itself; accepted:
    how many of token_ids were drafts, fewer than matched if a stop token cuts the output. finish, error: as in Delta.
    """

    sequence: RunningRequest
    row: int
    start: int
    kept: int
    logit_row: int = -1
    token_ids: list[int] = msgspec.field(default_factory=list)
    drafted: int = 0
    matched: int = 0
    accepted: int = 0
    finish: str | None = None
    error: str | None = None
