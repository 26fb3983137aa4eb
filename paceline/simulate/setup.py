"""What is simulated: a deploy file's settings, with seconds from tables or estimated from its GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

from cluster.errors import ConfigError
from modeling.kv_dtype import DTYPE_BYTES
from paceline.plan.document import USUAL_ACCEPTANCE, Assumed, make_plan
from paceline.plan.pricing import draft_times, target_times
from paceline.plan.reading import Draft, Inputs, Options, read_inputs
from paceline.plan.times import DraftTimes
from paceline.plan.timing import acceptance_rate
from paceline.simulate.run import SPREAD, Drafting, Setup
from verifier_service.scheduler import SchedulerLimits
from verifier_service.step_tables.prior import read_prior


@dataclass(frozen=True)
class Described:
    """setup: what runs. verifiers, drafters: as many as the file has."""

    file: str
    model_name: str
    setup: Setup
    block_size: int
    verifiers: int
    drafters: int


def describe(file: Path, options: Options) -> Described:
    """Raises ConfigError: the file, the options or a table cannot work, or nothing is known of the GPUs."""
    inputs = read_inputs(file, options)
    plan = make_plan(str(file), inputs, Assumed())
    application, draft = inputs.application, inputs.draft
    verifier = application.verifier
    if draft is None:
        raise ConfigError(
            f"{file}: verifier.speculation.mode is 'none', so that there is nothing to compare plain decoding with: "
            "set it to 'disaggregated' or 'colocated'"
        )
    steps, drafts = target_times(inputs), draft_times(draft)
    if steps is None or drafts is None:
        raise ConfigError(
            "the GPU types are not known, so that steps and drafts cannot be estimated: name them with --gpu and "
            "--drafter-gpu, or give measured ones with --steps and --drafts (`paceline bench steps` measures here)"
        )
    limits = SchedulerLimits(
        slots=verifier.max_requests,
        blocks=plan.target.kv_cache_tokens // verifier.block_tokens,
        block_tokens=verifier.block_tokens,
        step_tokens=verifier.max_step_tokens,
        max_waiting=verifier.max_waiting,
        prefix_cache=False,  # no two prompts begin alike
    )
    setup = Setup(
        target=steps,
        limits=limits,
        runs_ahead=verifier.device == "cuda",
        drafting=_drafting(inputs, draft, drafts),
    )
    remote = application.drafts_remotely and application.drafter is not None
    drafters = application.drafter.replicas if remote and application.drafter is not None else verifier.replicas
    return Described(str(file), application.model_name, setup, draft.model.block_size, verifier.replicas, drafters)


def check_lengths(setup: Setup, prompt: int, output: int) -> None:
    """Raises ConfigError for requests that no KV cache of these verifiers can hold."""
    longest, room = prompt + ceil(output * (1 + SPREAD)), setup.limits.blocks * setup.limits.block_tokens
    if longest > room:
        raise ConfigError(
            f"--prompt {prompt} and --output {output} come to requests of up to {longest} tokens, but a verifier's KV "
            f"cache has room for {room}: give shorter ones, or raise verifier.kv_cache_tokens"
        )


def survival_of(acceptance: str | None, block_size: int) -> tuple[float, ...]:
    """Chances that the first 1, 2, ... drafts of a block are all right. acceptance: tokens a step with whole blocks
    ("3.5"), or the chances themselves ("0.8,0.6,0.5"; 0 beyond them); None: what `paceline plan` assumes.

    Raises ConfigError.
    """
    if acceptance is None:
        return survival_of(str(min(USUAL_ACCEPTANCE, max(1.0, block_size / 2))), block_size)
    try:
        values = [float(part) for part in acceptance.split(",")]
        if len(values) == 1:
            rate = acceptance_rate(values[0], block_size)
            return tuple(rate**drafts for drafts in range(1, block_size))
    except ValueError as error:
        raise ConfigError(
            f"--acceptance is {acceptance!r} ({error}): give tokens a step, 1 to {block_size}, or a comma-separated "
            "list of chances that the first 1, 2, ... drafts are all right"
        ) from error
    falling = all(0 <= later <= earlier <= 1 for earlier, later in zip([1.0, *values], values))
    if not falling or len(values) >= block_size:
        raise ConfigError(
            f"--acceptance is {acceptance!r}: the chances that the first 1, 2, ... drafts are all right lie between 0 "
            f"and 1, never rise, and are at most {block_size - 1}, one less than the block size"
        )
    return (*values, *[0.0] * (block_size - 1 - len(values)))


def _drafting(inputs: Inputs, draft: Draft, times: DraftTimes) -> Drafting:
    verifier = inputs.application.verifier
    token_bytes = draft.config.hidden * DTYPE_BYTES[verifier.link.dtype]
    speculation = verifier.speculation
    return Drafting(
        times=times,
        block_size=draft.model.block_size,
        window=draft.window,
        slots=draft.contexts,
        token_bytes=token_bytes,
        feature_tokens=verifier.feature_store_bytes // token_bytes,
        soft_deadline_s=speculation.soft_deadline_s,
        hard_deadline_s=verifier.link.hard_deadline_s,
        most=speculation.max_draft_tokens,
        adaptive=speculation.adaptive,
        prior=read_prior(speculation.step_table, speculation.draft_table, inputs.target.config.layers),
    )
