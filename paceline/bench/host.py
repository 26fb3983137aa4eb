"""What a step costs beside the model: planning, packing, acceptance, emission, and the bookkeeping of drafts.

Over tcp, a drafter without a model answers on other threads of this process: their work does not count as the engine's.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cluster.contracts import Delta, EngineInfo, EngineRequest, SamplingParams
from cluster.errors import PacelineError
from cluster.link.drafter_end import DrafterServer
from cluster.link.face import VerifierLink
from cluster.link.verifier_end import RemoteLink
from paceline.bench.interleave import order
from paceline.bench.null_model import HIDDEN, VOCABULARY, NullDrafter, NullDrafts, NullFuser, NullLink, NullRunner
from verifier_service.engine import Engine
from verifier_service.features import FeatureStore
from verifier_service.packing import pack
from verifier_service.plan import StepPlan
from verifier_service.proposers.linked import LinkProposer
from verifier_service.scheduler import SchedulerLimits
from verifier_service.settled import settled

BLOCK_TOKENS = 16
PROMPT_TOKENS = 32  # and up to a block more, so that blocks do not fill up all in one step
STORE_BYTES = 256 << 20
RUN_S = 300.0
LINK_S = 10.0
AHEAD = "plain, ahead"  # launched before the one before is read, as on a GPU
PENALISED = "penalised, ahead"  # one request in so many:
PENALISED_SHARE = 8
RESTING = "resting"  # plain decoding that could be drafted with: features are kept
NAMES = ("plain", AHEAD, PENALISED, RESTING, "drafted", "drafted, tcp")


@dataclass(frozen=True)
class HostOptions:
    """requests: at once, all of them decoding. drafts: of a block; right: how many of them stand. steps: measured."""

    requests: int = 256
    drafts: int = 7
    right: int = 3
    steps: int = 200
    repeats: int = 3


@dataclass(frozen=True)
class HostRow:
    """Milliseconds a step outside the model's forward: medians over steps, of the median run; means while resting.

    cpu_ms: the engine thread's own time, which a busy machine changes little; wall_ms: as the clock says.
    """

    name: str
    requests: int
    tokens: int
    cpu_ms: float
    wall_ms: float
    packed_bytes: int


def measure(options: HostOptions, advance: Callable[[int, str], None]) -> list[HostRow]:
    """A row for each of NAMES, runs interleaved. Raises PacelineError if a run does not end, or does not draft."""
    runs: dict[str, list[HostRow]] = {name: [] for name in NAMES}
    for name in order(list(runs), options.repeats):
        with settled(), _link(name, options) as link:
            row = _run(name, options, link)
        runs[name].append(row)
        advance(1, f"{name}: {row.cpu_ms:.2f} ms")
    return [sorted(rows, key=lambda row: row.cpu_ms)[len(rows) // 2] for rows in runs.values()]


def table(rows: Sequence[HostRow]) -> Table:
    made = Table(title="Host time of a step, without a model", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "requests", "tokens a step", "CPU ms", "wall ms", "plan, bytes"):
        made.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        made.add_row(
            row.name,
            str(row.requests),
            str(row.tokens),
            f"{row.cpu_ms:.2f}",
            f"{row.wall_ms:.2f}",
            str(row.packed_bytes),
        )
    return made


def write_json(path: Path, rows: Sequence[HostRow], machine: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


Clocks = tuple[float, float]  # seconds: this thread's CPU time, wall


def _clocks() -> Clocks:
    return time.thread_time(), time.perf_counter()


class _Timed:
    """A runner that notes, by CPU and by wall clock, when each full step's forward begins and ends."""

    def __init__(self, runner: NullRunner, requests: int):
        self._runner, self._requests = runner, requests
        self.shape, self.counters = runner.shape, runner.counters
        self.set_taps, self.feed = runner.set_taps, runner.feed
        self.marks: list[tuple[Clocks, Clocks]] = []
        self.tokens, self.packed_bytes = 0, 0  # of the largest of them

    def forward(self, plan: StepPlan):
        began = _clocks()
        output = self._runner.forward(plan)
        if len(plan.verify) == self._requests and not plan.prefill:
            tokens = sum(len(row.token_ids) for row in plan.verify)
            if tokens > self.tokens:
                self.tokens, self.packed_bytes = tokens, 8 * len(pack(plan))
            self.marks.append((began, _clocks()))
        return output


@contextmanager
def _link(name: str, options: HostOptions) -> Iterator[VerifierLink | None]:
    drafts = NullDrafts(options.drafts + 1, options.right)
    if name in ("plain", AHEAD, PENALISED):
        yield None
    elif name in (RESTING, "drafted"):
        yield NullLink(drafts)
    else:
        server = DrafterServer(NullDrafter(drafts))
        link = RemoteLink(
            verifier_id="host",
            target_fingerprint="",
            feature_version="",
            hidden=HIDDEN,
            vocabulary=VOCABULARY,
            token="",
        )
        logging.getLogger("cluster.link.drafter_end").setLevel(logging.ERROR)  # that a run's link ends is no news
        try:
            link.set_drafters([server.address])
            deadline = time.monotonic() + LINK_S
            while not link.state.linked:
                if time.monotonic() > deadline:
                    raise PacelineError(f"the link to a drafter in this process did not stand within {LINK_S:g} s")
                time.sleep(0.001)
            yield link
        finally:
            link.stop()
            server.stop()


def _run(name: str, options: HostOptions, link: VerifierLink | None) -> HostRow:
    drafts = options.drafts if link is not None and name != RESTING else 0
    new_tokens = options.steps * (1 + min(drafts, options.right))
    context = PROMPT_TOKENS + BLOCK_TOKENS + new_tokens
    blocks = options.requests * (context // BLOCK_TOKENS + 2)
    # All prompts at once, so that all decode at once.
    step_tokens = options.requests * (PROMPT_TOKENS + BLOCK_TOKENS + drafts + 1)
    limits = SchedulerLimits(options.requests, blocks, BLOCK_TOKENS, step_tokens, 0)
    runner = _Timed(NullRunner(context), options.requests)
    proposer = None
    if link is not None:
        store = FeatureStore(STORE_BYTES, BLOCK_TOKENS, HIDDEN)
        proposer = LinkProposer(
            link,
            NullFuser(options.drafts + 1),
            store,
            verifier_id="host",
            max_draft_tokens=drafts,
            soft_deadline_s=1.0,
        )
    info = EngineInfo("host", "", context, VOCABULARY, options.requests, drafts + 1)
    engine = Engine(runner, limits, info, proposer=proposer, runs_ahead=name in (AHEAD, PENALISED))
    left, over = [options.requests], threading.Event()

    def sink(deltas: list[Delta]) -> None:
        left[0] -= sum(delta.finish is not None for delta in deltas)
        if left[0] == 0:
            over.set()

    for i in range(options.requests):
        count = PROMPT_TOKENS + i % BLOCK_TOKENS
        prompt = tuple(random.Random(i).choices(range(VOCABULARY), k=count))  # no two share a cached block
        penalised = name == PENALISED and i % PENALISED_SHARE == 0
        sampling = SamplingParams(frequency_penalty=0.001 if penalised else 0.0)  # changes no text here
        engine.submit(EngineRequest(f"request-{i}", prompt, 0, new_tokens, sampling=sampling), sink)
    engine.start()
    try:
        if not over.wait(RUN_S):
            raise PacelineError(f"the engine did not finish {options.requests} requests within {RUN_S:g} s")
        if engine.status().counters.get("drafting_failures", 0):
            raise PacelineError(f"drafting failed in the run {name!r}: see the log")
    finally:
        engine.stop()
    average = statistics.fmean if name == RESTING else statistics.median  # one step fuses what several have put off
    cpu, wall = (
        1000 * average(begin[clock] - end[clock] for (_, end), (begin, _) in pairwise(runner.marks)) for clock in (0, 1)
    )
    return HostRow(name, options.requests, runner.tokens, cpu, wall, runner.packed_bytes)
