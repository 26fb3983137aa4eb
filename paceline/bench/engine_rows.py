"""Starts the engines of the table: plain, deterministic, resting, drafted from another process or in rank 0's own."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from deploy.local import LocalDrafter, LocalGang
from drafter_service.config import DrafterSettings
from paceline.bench.engine_decoder import EngineDecoder
from paceline.bench.errors import BenchError
from verifier_service.config import LinkSettings, SpeculationSettings, VerifierSettings

PLAIN = "plain"
DETERMINISTIC = "deterministic"
DISAGGREGATED = "disaggregated"
COLOCATED = "colocated"
RESTING = "resting"
START_S = 600.0


@dataclass(frozen=True)
class EngineSetup:
    """What all engine rows share. context: tokens of the longest request; requests: most at once."""

    target: Path
    drafter: Path
    tensor_parallel: int
    dtype: str
    kv_dtype: str
    device: str
    requests: int
    context: int
    temperature: float
    stop_token_ids: frozenset[int]

    def verifier(self, mode: str, deterministic: bool = False, **speculation: object) -> VerifierSettings:
        """mode, speculation: as in SpeculationSettings. Room for all requests at their full length, a block to spare
        for each.
        """
        return VerifierSettings.model_validate(
            {
                "target": str(self.target),
                "drafter": None if mode == "none" else str(self.drafter),
                "tensor_parallel_size": self.tensor_parallel,
                "dtype": self.dtype,
                "kv_dtype": self.kv_dtype,
                "deterministic": deterministic,
                "device": self.device,
                "max_requests": self.requests,
                "kv_cache_tokens": self.requests * (self.context + 64),
                "speculation": SpeculationSettings.model_validate({"mode": mode, **speculation}),
                "link": LinkSettings.model_validate({"dtype": self.dtype}),
            }
        )

    def draft_service(self) -> DrafterSettings:
        return DrafterSettings.model_validate(
            {
                "checkpoint": str(self.drafter),
                "target": str(self.target),
                "dtype": self.dtype,
                "device": self.device,
                "max_contexts": 2 * self.requests,
            }
        )


def plain(setup: EngineSetup, stack: ExitStack) -> EngineDecoder:
    """No taps, no feature store, no link."""
    return _decoder(PLAIN, setup, setup.verifier("none"), stack, "no drafter")


def deterministic(setup: EngineSetup, stack: ExitStack) -> EngineDecoder:
    """As plain, in deterministic mode. Raises BenchError where the verifier's settings refuse that."""
    try:
        settings = setup.verifier("none", deterministic=True)
    except ValidationError as error:
        raise BenchError(f"--deterministic: {error.errors()[0]['msg']}") from error
    return _decoder(DETERMINISTIC, setup, settings, stack, "no drafter, deterministic: true")


def disaggregated(setup: EngineSetup, stack: ExitStack) -> EngineDecoder:
    """The drafter in a process of its own, at the other end of a tcp link."""
    drafter = stack.enter_context(LocalDrafter(setup.draft_service(), start_timeout_s=START_S))
    decoder = _decoder(
        DISAGGREGATED, setup, setup.verifier("disaggregated"), stack, "drafter in another process, tcp link"
    )
    decoder.link_to(drafter.address)
    return decoder


def colocated(setup: EngineSetup, stack: ExitStack) -> EngineDecoder:
    """The drafter in rank 0's process, on its thread."""
    return _decoder(COLOCATED, setup, setup.verifier("colocated"), stack, "drafter in the target's process")


def resting(setup: EngineSetup, stack: ExitStack) -> EngineDecoder:
    """As colocated, but nothing is drafted: what it costs to be ready for it."""
    note = "colocated, max_draft_tokens: 0"
    return _decoder(RESTING, setup, setup.verifier("colocated", max_draft_tokens=0), stack, note)


def _decoder(name: str, setup: EngineSetup, settings: VerifierSettings, stack: ExitStack, note: str) -> EngineDecoder:
    gang = stack.enter_context(LocalGang(settings, engine_id=f"bench-{name}", start_timeout_s=START_S))
    mode = settings.speculation.mode
    decoder = EngineDecoder(
        name,
        note,
        gang.address,
        setup.stop_token_ids,
        setup.temperature,
        drafted=mode != "none",
        remote=mode == "disaggregated",
    )
    stack.callback(decoder.close)
    return decoder
