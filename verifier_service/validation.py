"""What an engine refuses, and how it says so: the field, the value and the limit. Plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.contracts import EngineRequest

MAX_LOGPROBS = 20
MAX_BIASED = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0  # presence and frequency, of either sign
MAX_REPETITION_PENALTY = 10.0
MAX_REQUEST_ID = 256  # characters
INT32 = 1 << 31


@dataclass(frozen=True)
class RequestLimits:
    """Of the loaded target and its cache, in tokens."""

    vocabulary: int
    max_context: int
    cache_tokens: int


def problem(request: EngineRequest, limits: RequestLimits) -> str | None:
    """The first thing that makes a request impossible to serve, or None."""
    return _ids(request, limits) or _lengths(request, limits) or _sampling(request, limits)


def _ids(request: EngineRequest, limits: RequestLimits) -> str | None:
    if not request.request_id:
        return "request_id is empty: give every request its own"
    if len(request.request_id) > MAX_REQUEST_ID:
        return f"request_id has {len(request.request_id)} characters: at most {MAX_REQUEST_ID} are possible"
    if not 0 <= request.choice < INT32:
        return f"choice is {request.choice}: it counts from 0, up to {INT32 - 1}"
    if not request.prompt_ids:
        return "prompt_ids is empty: a prompt needs at least one token"
    for name, ids in (("prompt_ids", request.prompt_ids), ("generated_ids", request.generated_ids)):
        if ids and (min(ids) < 0 or max(ids) >= limits.vocabulary):
            at, token = next((i, t) for i, t in enumerate(ids) if not 0 <= t < limits.vocabulary)
            return f"{name}[{at}] is {token}: the target's vocabulary is 0..{limits.vocabulary - 1}"
    if wrong := [token for token in request.stop_token_ids if not 0 <= token < limits.vocabulary]:
        return f"stop_token_ids holds {wrong[0]}: the target's vocabulary is 0..{limits.vocabulary - 1}"
    return None


def _lengths(request: EngineRequest, limits: RequestLimits) -> str | None:
    prompt, output = len(request.prompt_ids), request.max_new_tokens
    if output < 1:
        return f"max_new_tokens is {output}: ask for at least 1"
    if not 0 <= request.min_new_tokens <= output:
        return f"min_new_tokens is {request.min_new_tokens}: it must be in 0..{output} (max_new_tokens)"
    if len(request.generated_ids) > output:
        return f"generated_ids holds {len(request.generated_ids)} tokens, more than max_new_tokens {output}"
    if request.max_draft_tokens is not None and request.max_draft_tokens < 0:
        return f"max_draft_tokens is {request.max_draft_tokens}: 0 is plain decoding, None the engine's choice"
    for limit, what in ((limits.max_context, "the context"), (limits.cache_tokens, "the KV cache")):
        if prompt + output > limit:
            return (
                f"prompt_ids ({prompt} tokens) and max_new_tokens ({output}) make {prompt + output}, "
                f"beyond {what} of {limit} tokens: shorten the prompt or ask for less"
            )
    return None


def _sampling(request: EngineRequest, limits: RequestLimits) -> str | None:
    params = request.sampling
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        return f"sampling.temperature is {params.temperature}: it must be 0 (greedy) or a finite number above"
    if not 0 < params.top_p <= 1:
        return f"sampling.top_p is {params.top_p}: it must be above 0 and at most 1"
    if not 0 <= params.top_k < INT32:
        return f"sampling.top_k is {params.top_k}: 0 is off, otherwise it must be in 1..{INT32 - 1}"
    if not 0 <= params.min_p <= 1:
        return f"sampling.min_p is {params.min_p}: 0 is off, otherwise it must be at most 1"
    for name, value in (("presence", params.presence_penalty), ("frequency", params.frequency_penalty)):
        if not -MAX_PENALTY <= value <= MAX_PENALTY:
            return f"sampling.{name}_penalty is {value}: it must be in -{MAX_PENALTY:g}..{MAX_PENALTY:g}"
    if not 0 < params.repetition_penalty <= MAX_REPETITION_PENALTY:
        limit = f"{MAX_REPETITION_PENALTY:g}"
        return f"sampling.repetition_penalty is {params.repetition_penalty}: it must be above 0 and at most {limit}"
    if len(params.logit_bias) > MAX_BIASED:
        return f"sampling.logit_bias holds {len(params.logit_bias)} tokens: at most {MAX_BIASED} are possible"
    for token, bias in params.logit_bias:
        if not 0 <= token < limits.vocabulary:
            return f"sampling.logit_bias names token {token}: the target's vocabulary is 0..{limits.vocabulary - 1}"
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            return f"sampling.logit_bias of token {token} is {bias}: it must be in -{MAX_BIAS:g}..{MAX_BIAS:g}"
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        return f"sampling.logprobs is {params.logprobs}: it must be in 0..{MAX_LOGPROBS}"
    if request.deadline is not None and not math.isfinite(request.deadline):
        return f"deadline is {request.deadline}: give unix seconds, or none"
    return None


def already_ended(request: EngineRequest) -> str | None:
    """A resumed request may have had its last token before its engine died."""
    generated = request.generated_ids
    if generated and generated[-1] in request.stop_token_ids and len(generated) > request.min_new_tokens:
        return "stop"
    return "length" if len(generated) >= request.max_new_tokens else None
