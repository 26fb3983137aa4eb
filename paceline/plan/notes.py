"""What a user should know of a deploy file although it fits: limits that will be met, memory that is left."""

from __future__ import annotations

from collections.abc import Iterator

from deploy.config import Application
from paceline.plan.gpus import GB
from paceline.plan.reading import Draft, Inputs

ROOM = 1.25  # times the file's KV cache: worth telling
ROUND = 1024  # tokens


def notes(inputs: Inputs, kv_tokens: int, kv_capacity: int | None) -> Iterator[str]:
    """kv_tokens: of the KV cache, 0 where it is to be measured on a GPU that is not known. kv_capacity: tokens that the
    GPUs' memory would hold; None where it is not known.
    """
    application = inputs.application
    verifier = application.verifier
    longest = verifier.max_context or inputs.target.config.max_context
    if 0 < kv_tokens < longest:
        yield (
            f"kv_cache_tokens {kv_tokens:,} is less than the longest context of {longest:,}: a request "
            "that needs more is refused"
        )
    if verifier.kv_cache_tokens != "auto" and kv_capacity is not None and kv_capacity > ROOM * kv_tokens:
        yield f"there is memory for kv_cache_tokens: {kv_capacity // ROUND * ROUND}"
    if inputs.gpu is None and verifier.device == "cuda":
        yield (
            "the GPU type is not known, so nothing is held against its memory: name it with --gpu, or in "
            'verifier.rank_resources as "accelerator_type:H200": 0.001'
        )
    if inputs.draft is not None:
        yield from _of_drafts(application, inputs, inputs.draft, longest)


def _of_drafts(application: Application, inputs: Inputs, draft: Draft, longest: int) -> Iterator[str]:
    verifier, drafter = application.verifier, application.drafter
    if application.drafts_remotely and drafter is not None:
        contexts, requests = draft.contexts * drafter.replicas, verifier.max_requests * verifier.replicas
        if contexts < requests:
            yield (
                f"drafters hold {contexts} contexts, verifiers run up to {requests} requests: beyond that some go "
                "without drafts"
            )
    row = inputs.target.config.hidden * inputs.target.itemsize
    features, wanted = verifier.feature_store_bytes // row, verifier.max_requests * min(draft.window, longest)
    if features < wanted:
        yield (
            f"feature_store_bytes holds the features of {features:,} tokens; {verifier.max_requests} requests with "
            f"whole windows have {wanted:,} ({wanted * row / GB:.1f} GB of host memory): beyond it a rebuilt draft "
            "context begins later"
        )
