"""The flight recorder: an engine's last steps, kept in memory and written when it crashes, to be run again offline.

A record names requests and their tokens, not slots and KV blocks: what a step did follows from them, on any machine.
The file holds prompts as token ids: it is readable by its owner only.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import msgspec
from msgspec.structs import replace

from cluster.contracts import EngineRequest
from cluster.errors import PacelineError
from modeling.kv_dtype import KvDtype
from verifier_service.plan import PrefillChunk, VerifyRow
from verifier_service.sequence import RunningRequest

STEPS = 256
FORMAT = 1
SUFFIX = ".flight"


class FlightError(PacelineError):
    """A file that is no flight record: names it and the cure."""


class FlightTarget(msgspec.Struct, frozen=True):
    """What ran: where the checkpoint lay, and how it was loaded."""

    directory: str
    fingerprint: str
    dtype: str
    tensor_parallel_size: int
    block_tokens: int
    kv_dtype: KvDtype = "auto"
    deterministic: bool = False


class FlightRow(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of requests[request], from position start on. verify: bonus token and drafts; else a prefill chunk.

    A token below 0 was taken by the step before, which the engine never read.
    """

    request: int
    start: int
    token_ids: tuple[int, ...]
    verify: bool
    completes_prompt: bool


class FlightStep(msgspec.Struct, frozen=True):
    """samples: as Scheduler.commit takes them; None for the step that the engine died in. seconds: of the step."""

    step: int
    rows: tuple[FlightRow, ...]
    samples: tuple[int, ...] | None
    seconds: float


class FlightRequest(msgspec.Struct, frozen=True):
    """token_ids: prompt and all output that was known when the record was written."""

    request: EngineRequest
    token_ids: tuple[int, ...]


class Flight(msgspec.Struct, frozen=True):
    """One engine's last steps, oldest first, empty ones left out. written: unix seconds."""

    format: int
    reason: str
    engine_id: str
    written: float
    target: FlightTarget
    requests: tuple[FlightRequest, ...]
    steps: tuple[FlightStep, ...]


Planned = Sequence[tuple[RunningRequest, VerifyRow | PrefillChunk]]


class FlightRecorder:
    """directory: where `write` puts its file; made when needed. Owned by the engine's thread; a step costs one append.

    Holds on to the planned requests themselves: their tokens only ever grow, so that what a step saw can be told later.
    """

    def __init__(self, directory: str | Path, engine_id: str, target: FlightTarget, steps: int = STEPS):
        self._directory, self._engine_id, self._target = Path(directory), engine_id, target
        self._steps: deque[_Step] = deque(maxlen=steps)

    def planned(self, step: int, work: Planned) -> None:
        """A step begins. `work` must not be changed afterwards."""
        if work:
            self._steps.append(_Step(step, work))

    def done(self, step: int, samples: Sequence[int], seconds: float) -> None:
        for one in islice(reversed(self._steps), 2):  # another may have begun
            if one.step == step:
                one.samples, one.seconds = samples, seconds

    def write(self, reason: str) -> Path | None:
        """The file, or None if nothing was recorded. Raises OSError if it cannot be written."""
        if not self._steps:
            return None
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"{self._engine_id.replace(os.sep, '-')}-{time.strftime('%Y%m%d-%H%M%S')}-"
        handle, path = tempfile.mkstemp(SUFFIX, name, self._directory)  # mkstemp: the owner's only
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.msgpack.encode(self._flight(reason)))
        return Path(path)

    def _flight(self, reason: str) -> Flight:
        requests: dict[int, tuple[int, RunningRequest]] = {}  # a request may leave and come back under the same id
        steps = []
        for one in self._steps:
            rows = []
            for sequence, work in one.work:
                number, _ = requests.setdefault(id(sequence), (len(requests), sequence))
                verify = isinstance(work, VerifyRow)
                completes = isinstance(work, PrefillChunk) and work.completes_prompt
                rows.append(FlightRow(number, work.start, _told(sequence, work), verify, completes))
            samples = None if one.samples is None else tuple(one.samples)
            steps.append(FlightStep(one.step, tuple(rows), samples, one.seconds))
        return Flight(
            FORMAT,
            reason,
            self._engine_id,
            time.time(),
            self._target,
            tuple(
                # The salt is a client's secret's hash, and of no use to a replay.
                FlightRequest(replace(sequence.request, cache_salt=""), tuple(sequence.tokens))
                for _, sequence in requests.values()
            ),
            tuple(steps),
        )


def _told(sequence: RunningRequest, work: VerifyRow | PrefillChunk) -> tuple[int, ...]:
    """A row's tokens; of one that was planned ahead, by what is known of it by now."""
    if work.token_ids[0] >= 0:
        return work.token_ids
    return tuple(sequence.tokens[work.start : work.start + 1]) or (-1,)


class _Step:
    __slots__ = ("samples", "seconds", "step", "work")

    def __init__(self, step: int, work: Planned):
        self.step, self.work = step, work
        self.samples: Sequence[int] | None = None
        self.seconds = 0.0


def read_flight(path: Path) -> Flight:
    """Raises FlightError for a file that is none, or of another format."""
    try:
        flight = msgspec.msgpack.decode(path.read_bytes(), type=Flight)
    except OSError as error:
        raise FlightError(f"{path} cannot be read ({error}): give a file that a flight recorder wrote") from error
    except msgspec.MsgspecError as error:
        raise FlightError(f"{path} is no flight record ({error}): give a file that a flight recorder wrote") from error
    if flight.format != FORMAT:
        raise FlightError(f"{path} has format {flight.format}, this version reads {FORMAT}: use the one that wrote it")
    return flight
