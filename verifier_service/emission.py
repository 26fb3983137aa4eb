"""From a step's progress to Deltas: one list per sink and step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from cluster.contracts import Delta, EngineRequest, TokenLogprobs
from verifier_service.sampling.logprobs import logprobs
from verifier_service.sampling.step_logits import StepLogits
from verifier_service.sequence import Key, Progress

Sink = Callable[[list[Delta]], None]

# Without an error_kind: on another engine the same input would most likely end the same way.
NOT_FINITE = "the model's logits for this request are not finite numbers: its weights or dtype do not suit the input"


def error_delta(request: EngineRequest, why: str, kind: str) -> Delta:
    """kind: as Delta.error_kind."""
    return Delta(request.request_id, request.choice, (), finish="error", error=why, error_kind=kind)


class Emission:
    """Hands every sink what this step has for it."""

    def emit(self, progress: Sequence[Progress], logits: StepLogits | None) -> None:
        """logits: the step's; None where nobody wants logprobs."""
        told = _logprobs([p for p in progress if p.sequence.logprobs is not None], logits)
        by_sink: dict[Sink, list[Delta]] = {}
        for p in progress:
            if not p.token_ids and p.finish is None:
                continue
            sequence = p.sequence
            request_id, choice = sequence.key
            delta = Delta(
                request_id,
                choice,
                tuple(p.token_ids),
                p.accepted,
                p.drafted,
                told.get(sequence.key) if told else None,
                p.finish,
                (p.error or NOT_FINITE) if p.finish == "error" else None,
                cached=_cached(p) if sequence.cached else 0,
            )
            deltas = by_sink.get(sequence.sink)
            if deltas is None:
                by_sink[sequence.sink] = [delta]
            else:
                deltas.append(delta)
        for sink, deltas in by_sink.items():
            sink(deltas)


def _cached(progress: Progress) -> int:
    """With a request's first new tokens only; after a preemption it may enter with some of its output as well."""
    sequence = progress.sequence
    first = sequence.generated - len(progress.token_ids) == len(sequence.request.generated_ids)
    return min(sequence.cached, sequence.prompt_tokens) if first else 0


def _logprobs(progress: Sequence[Progress], logits: StepLogits | None) -> dict[Key, tuple[TokenLogprobs, ...]]:
    """Of those that want them, all at once: a device is waited for once a step, not once a request."""
    rows: list[int] = []
    tokens: list[int] = []
    tops: list[int] = []
    for p in progress:
        if p.token_ids:
            assert logits is not None, "a step with such a request has logits"
            first = logits.place(p.logit_row)
            rows += range(first, first + len(p.token_ids))
            tokens += p.token_ids
            tops += [p.sequence.logprobs or 0] * len(p.token_ids)
    found = iter(logprobs(logits.values, rows, tokens, tops) if logits is not None and rows else ())
    return {p.sequence.key: tuple(islice(found, len(p.token_ids))) for p in progress}
