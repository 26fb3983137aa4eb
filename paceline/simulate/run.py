"""One run: verifiers and drafters under a load, for so many seconds of virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from cluster.contracts import EngineRequest
from paceline.bench.null_model import NullFuser
from paceline.bench.percentiles import percentile
from paceline.plan.times import DraftTimes, TargetTimes
from paceline.simulate.drafters import Fault, Guess, SimulatedDrafter
from paceline.simulate.links import Pool, SimulatedLink, Wire
from paceline.simulate.verifier import SimulatedVerifier
from paceline.simulate.virtual_time import Process, VirtualTime
from verifier_service.control import SpeculationControl
from verifier_service.features import FeatureStore
from verifier_service.proposers.face import Proposer
from verifier_service.proposers.linked import LinkProposer
from verifier_service.proposers.plain import NoProposer
from verifier_service.scheduler import SchedulerLimits
from verifier_service.step_tables.prior import StepPrior

SPREAD = 0.5  # outputs are between so much shorter and longer than their mean, evenly
FEATURE_BYTES = 4  # of a token in the simulated store: one float


@dataclass(frozen=True)
class Drafting:
    """What of a deploy file concerns drafts. slots: contexts of a drafter. feature_tokens: that the verifier's store
    holds. most: drafts a request, None = block_size - 1. prior: what the control begins with.
    """

    times: DraftTimes
    block_size: int
    window: int
    slots: int
    token_bytes: float
    feature_tokens: int
    soft_deadline_s: float
    hard_deadline_s: float
    most: int | None = None
    adaptive: bool = True
    prior: StepPrior | None = None


@dataclass(frozen=True)
class Setup:
    """What does not change from run to run. drafting: None for plain decoding."""

    target: TargetTimes
    limits: SchedulerLimits
    runs_ahead: bool
    drafting: Drafting | None


@dataclass(frozen=True)
class Load:
    """concurrency: clients of each verifier that send their next request when the last has ended; or rate: requests a
    second over all verifiers, whenever they like. Lengths in tokens. warm_up_s: of `seconds`, not counted.
    survival, certainty: see Guess.
    """

    concurrency: int | None
    rate: float | None
    prompt: int
    output: int
    survival: tuple[float, ...]
    seconds: float
    warm_up_s: float = 0.0
    certainty: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """Of all verifiers together. Latencies in seconds, None where there was nothing to measure. running: requests in a
    step, on average. tau: tokens of a row with drafts. waste: drafts that did not stand, as a share. busy: share of
    their time in which drafters drafted. late, missed: asks that were answered after the wait for them, or never in it.
    """

    tokens_per_s: float
    running: float
    token_p50: float | None
    token_p95: float | None
    first_p50: float | None
    first_p95: float | None
    tau: float | None
    drafted_steps: float
    waste: float | None
    busy: float
    asks: int
    late: int
    missed: int
    preemptions: int
    refused: int


def simulate(
    setup: Setup,
    load: Load,
    *,
    drafters: int = 1,
    verifiers: int = 1,
    faults: Sequence[Fault] = (),
    advance: Callable[[], object] = lambda: None,
) -> Figures:
    """drafters: 0 for plain decoding. faults: of the first drafters; the others are well. advance: called a hundred
    times, as time goes on.
    """
    with VirtualTime() as time:
        world = _World(time, setup, load, drafters, verifiers, faults)
        for part in range(1, 101):
            time.run(load.seconds * part / 100)
            advance()
        return world.figures()


@dataclass
class _World:
    time: VirtualTime
    setup: Setup
    load: Load
    drafter_count: int
    verifier_count: int
    faults: Sequence[Fault]
    links: list[SimulatedLink] = field(default_factory=list)
    drafters: list[SimulatedDrafter] = field(default_factory=list)
    sent: int = 0

    def __post_init__(self) -> None:
        time, setup, load = self.time, self.setup, self.load
        self.rng = Random(load.seed)
        self.verifiers = [
            SimulatedVerifier(
                time,
                setup.target,
                setup.limits,
                self._proposer,
                self._finished,
                load.warm_up_s,
                load.seed + number,
                setup.runs_ahead,
            )
            for number in range(self.verifier_count)
        ]
        drafting = setup.drafting
        if drafting is not None and self.drafter_count:
            guess = Guess(load.survival, load.certainty, load.seed)
            for number in range(self.drafter_count):
                fault = self.faults[number] if number < len(self.faults) else Fault()
                self.drafters.append(
                    SimulatedDrafter(
                        time, f"drafter-{number}", drafting.times, drafting.slots, drafting.window, guess, fault
                    )
                )
            Pool(time, self.drafters, self.links, drafting.hard_deadline_s)
        if load.rate is not None:
            self._arrive()
        for verifier in self.verifiers:
            for _ in range(load.concurrency or 0):
                verifier.submit(self._request(begun=True))

    def _proposer(self, process: Process) -> Proposer:
        drafting = self.setup.drafting
        if drafting is None or not self.drafter_count:
            return NoProposer()
        name = f"verifier-{len(self.links)}"
        wire = Wire(drafting.token_bytes, drafting.times.round_trip_s, drafting.block_size, drafting.hard_deadline_s)
        link = SimulatedLink(self.time, process, name, wire)
        self.links.append(link)
        return LinkProposer(
            link,
            NullFuser(drafting.block_size),
            FeatureStore(drafting.feature_tokens * FEATURE_BYTES, self.setup.limits.block_tokens, 1),
            verifier_id=name,
            max_draft_tokens=drafting.most,
            soft_deadline_s=drafting.soft_deadline_s,
            control=SpeculationControl(drafting.block_size - 1, drafting.prior) if drafting.adaptive else None,
            clock=lambda: self.time.now,
        )

    # Requests.

    def _request(self, begun: bool = False) -> EngineRequest:
        """begun: of the first ones, each is somewhere in its output, so that they do not all end together."""
        output = self.load.output * self.rng.uniform(1 - SPREAD, 1 + SPREAD) * (self.rng.random() if begun else 1.0)
        self.sent += 1
        prompt = tuple(range(self.load.prompt))
        return EngineRequest(f"request-{self.sent}", prompt, self.sent, max_new_tokens=max(1, round(output)))

    def _arrive(self) -> None:
        """To the verifier that holds the fewest."""
        assert self.load.rate is not None, "arrivals have a rate"

        def come() -> None:
            min(self.verifiers, key=lambda verifier: verifier.held).submit(self._request())
            self._arrive()

        self.time.at(self.time.now + self.rng.expovariate(self.load.rate), come)

    def _finished(self, verifier: SimulatedVerifier) -> None:
        if self.load.rate is None:
            verifier.submit(self._request())

    # Results.

    def figures(self) -> Figures:
        tallies = [verifier.tally for verifier in self.verifiers]
        counters = [verifier.counters for verifier in self.verifiers]
        elapsed = self.load.seconds - self.load.warm_up_s
        steps = sum(tally.steps for tally in tallies)
        drafts, accepted = sum(tally.drafts for tally in tallies), sum(tally.accepted for tally in tallies)
        drafted_rows = sum(tally.drafted_rows for tally in tallies)
        token_s = [seconds for tally in tallies for seconds in tally.token_s]
        first_s = [seconds for tally in tallies for seconds in tally.first_s]
        busy = sum(drafter.busy_s for drafter in self.drafters)

        def total(name: str) -> int:
            return int(sum(each.get(name, 0.0) for each in counters))

        return Figures(
            tokens_per_s=sum(tally.tokens for tally in tallies) / elapsed,
            running=sum(tally.rows for tally in tallies) / steps if steps else 0.0,
            token_p50=percentile(token_s, 50) if token_s else None,
            token_p95=percentile(token_s, 95) if token_s else None,
            first_p50=percentile(first_s, 50) if first_s else None,
            first_p95=percentile(first_s, 95) if first_s else None,
            tau=1 + accepted / drafted_rows if drafted_rows else None,
            drafted_steps=sum(tally.drafted_steps for tally in tallies) / steps if steps else 0.0,
            waste=1 - accepted / drafts if drafts else None,
            busy=busy / (self.load.seconds * len(self.drafters)) if self.drafters else 0.0,
            asks=total("draft_asks"),
            late=total("drafts_late"),
            missed=total("drafts_missed"),
            preemptions=total("preemptions"),
            refused=sum(tally.refused for tally in tallies),
        )
