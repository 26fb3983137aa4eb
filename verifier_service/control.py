"""How many draft tokens to ask for: pure policy on plain values, no torch.

Maximises expected committed tokens a second. For n requests that ask for k drafts each, a step is expected to commit
n x (1 + sum over i <= k of the chance that the first i drafts are all accepted) tokens, and to take

    plain(n) + k x n x row(n) + wait(n)         (wait only if k > 0)

seconds, all measured here on the steps themselves; k = 0 is plain decoding and one of the choices. Positions beyond the
verified k are censored, not rejected. What is not measured any more grows stale, so both ways are probed now and then.

A probe asks for a few of the requests only, because in a large batch it is mostly loss: the others' features would have
to be sent first. Probes that lose come at doubling distances, and so rarely that what they lose is a small share of the
time, the first ones at new batch sizes included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

COST_WEIGHT = 0.1  # of a new sample of seconds, once there are ten
ACCEPTED_WEIGHT = 0.02  # of a new sample of acceptance, once there are fifty: single rows say little
WORTH = 1.03  # drafting has to promise this much over plain decoding: estimates err
PLAIN_FIRST = 3  # plain steps before the first drafts of a batch size are asked for
PLAIN_EVERY = 64  # drafted steps between two plain ones
PROBE_ROWS, PROBE_LEAST = 24, 4  # a probe lasts until so many rows are verified, and so many steps at least
FIRST_PAUSE, LONGEST_PAUSE = 64, 4096  # plain steps between two probes, as pauses double
LONGEST_DEBT = 1 << 16  # the same after a probe that has lost so much that its share takes longer
PROBE_REQUESTS = 8  # are asked for in a probe, at most
SCALED_BY = 4  # full asks after such a probe, which tell what the others cost
PROBE_SHARE = 0.01  # of the time may go into probes that lose
FIRST_SHARE = 0.02  # the same for all batch sizes together, before another size is probed for the first time
OUTLIER = 8  # times the usual: a longer wait counts as one of so many: the first may compile, and says little
FULL_EVERY = 24  # drafted steps between two that ask for all rows, so that far positions stay known


@dataclass(slots=True)
class Mean:
    """Running mean that forgets: exact over the first samples, exponential with `weight` later."""

    weight: float = COST_WEIGHT
    value: float = 0.0
    samples: int = 0

    def add(self, sample: float) -> None:
        self.samples += 1
        self.value += max(self.weight, 1 / self.samples) * (sample - self.value)


@dataclass(slots=True)
class _Costs:
    """Seconds of a step at one batch size: plain, per drafted token beyond it, waiting for drafts of all requests.

    Steps that hold prefill are not measured: under steady load there may be no plain sample at all.
    part: waits of the last probe, which asked for some of the requests; scale: what all cost, as a multiple of that.
    """

    plain: Mean = field(default_factory=Mean)
    row: Mean = field(default_factory=Mean)
    wait: Mean = field(default_factory=Mean)
    part: Mean = field(default_factory=Mean)
    scale: Mean = field(default_factory=lambda: Mean(value=1.0))
    scaling: int = 0  # full asks left that tell the scale
    lost: float = 0.0  # seconds beyond plain steps since drafting was last found worth it
    first: int = PLAIN_FIRST  # plain steps left before any drafts
    fresh: bool = True  # never probed
    since_plain: int = 0
    since_full: int = 0
    paused: int = 0  # plain steps left before the next probe
    pause: int = FIRST_PAUSE
    probing: int = 0  # asks left whatever they cost

    def doubt_scale(self) -> None:
        """Only full asks measure it, and where it is too high there are none: it falls until there are some again."""
        doubted = (1 + self.scale.value) / 2
        self.wait.value *= doubted / max(self.scale.value, 1e-9)
        self.scale = Mean(value=doubted)


class SpeculationControl:
    """One engine's choice of k, by batch size (requests rounded up to a power of two). most: block size - 1."""

    def __init__(self, most: int):
        self.most = most
        self._reached = [Mean(ACCEPTED_WEIGHT) for _ in range(most)]  # P(draft i accepted | all before it accepted)
        self._costs: dict[int, _Costs] = {}
        self._elapsed = self._lost = 0.0  # seconds: of all steps; of those, beyond plain ones in probes that lost
        self.ask_at_most = 1 << 30  # requests, as of the last choice

    def choose(self, requests: int) -> int:
        """Drafts to ask for each request of the next step, of `ask_at_most` requests; 0 = none. Call once a step."""
        costs = self._of(requests)
        self.ask_at_most = requests
        if costs.first > 0:
            costs.first -= 1
            return 0
        if costs.fresh:
            if self._in_debt:
                return 0
            self._begin_probe(costs, requests)
        if costs.probing > 0:  # until `waited` has counted them: not every choice can be followed by an ask
            self.ask_at_most = PROBE_REQUESTS
            return self.most
        if costs.paused > 0:
            costs.paused -= 1
            if costs.paused == 0:
                self._begin_probe(costs, requests)
            return 0
        best = self._best(costs, requests)
        if best == 0:
            self._lost += costs.lost
            affordable = int(costs.lost / (PROBE_SHARE * max(costs.plain.value, 1e-9)))
            costs.paused, costs.lost = max(costs.pause, min(affordable, LONGEST_DEBT)), 0.0
            costs.pause = min(2 * costs.pause, LONGEST_PAUSE)
            costs.doubt_scale()
            return 0
        if not costs.scaling:
            costs.pause, costs.lost = FIRST_PAUSE, 0.0
        costs.since_plain += 1
        if costs.since_plain >= PLAIN_EVERY:
            costs.since_plain = 0
            return 0
        costs.since_full += 1
        if costs.since_full >= FULL_EVERY:
            costs.since_full = 0
            return self.most
        return best

    def rests(self, requests: int) -> bool:
        """Whether the next `choose` says 0, as far as can be known."""
        costs = self._of(requests)
        if costs.first > 0:
            return True
        return self._in_debt if costs.fresh else costs.probing == 0 and costs.paused > 0

    def step(self, requests: int, drafted: int, seconds: float) -> None:
        """A step without prefill: `requests` rows with `drafted` drafts in all took `seconds`, waits left out."""
        costs = self._of(requests)
        self._elapsed += seconds
        if drafted == 0:
            costs.plain.add(seconds)
        elif costs.plain.samples:
            costs.row.add((seconds - costs.plain.value) / drafted)
            costs.lost += max(0.0, seconds - costs.plain.value)

    def waited(self, requests: int, seconds: float | None) -> None:
        """Asking for drafts as chosen and waiting for them took `seconds`; None: the wait ended at its deadline.

        What such a wait costs is not held against drafting: asks after it are held back by their own rule (Patience).
        """
        costs = self._of(requests)
        partial = costs.probing > 0 and requests > PROBE_REQUESTS
        costs.probing = max(0, costs.probing - 1)
        if seconds is None:
            return
        self._elapsed += seconds
        usual = max(costs.wait.value, costs.plain.value)
        seconds = min(seconds, OUTLIER * usual) if usual else seconds
        costs.lost += seconds
        if partial:
            costs.part.add(seconds)
            costs.wait.add(seconds * costs.scale.value)
        elif costs.scaling and costs.part.value:
            costs.scaling -= 1
            costs.scale.add(seconds / costs.part.value)
            costs.wait.value = costs.part.value * costs.scale.value
        else:
            costs.wait.add(seconds)
        asked = _probe_steps(requests) - costs.probing
        if asked >= PROBE_LEAST and costs.plain.samples and costs.wait.value > self.most * costs.plain.value:
            costs.probing = 0  # were all drafts right, it would not pay

    def verified(self, drafted: int, accepted: int) -> None:
        """One request's row: `accepted` of `drafted` drafts were right; the first wrong one ends what is known."""
        for position in range(min(accepted + 1, drafted, self.most)):
            self._reached[position].add(float(position < accepted))

    def renew(self) -> None:
        """Another drafter: nothing is held against it."""
        self._reached = [Mean(ACCEPTED_WEIGHT) for _ in range(self.most)]
        for size, costs in self._costs.items():
            costs.wait, costs.scale = Mean(), Mean(value=1.0)
            costs.paused, costs.pause, costs.lost = 0, FIRST_PAUSE, 0.0
            self._begin_probe(costs, size)
        self._lost = 0.0

    def expected(self, drafts: int) -> float:
        """Tokens that a row with so many drafts is expected to commit."""
        total = survival = 1.0
        for position in range(drafts):
            survival *= self._reached[position].value
            total += survival
        return total

    @property
    def _in_debt(self) -> bool:
        """Whether other batch sizes have lost too much for one that was never probed to begin."""
        return self._lost > FIRST_SHARE * self._elapsed

    def _best(self, costs: _Costs, requests: int) -> int:
        if not costs.plain.samples:
            return self.most  # nothing to compare with
        best, rate = 0, WORTH / max(costs.plain.value, 1e-9)
        for drafts in range(1, self.most + 1):
            promised = self.expected(drafts) / self._seconds(costs, requests, drafts)
            if promised > rate:
                best, rate = drafts, promised
        return best

    def _begin_probe(self, costs: _Costs, requests: int) -> None:
        costs.fresh = False
        costs.probing = _probe_steps(requests)
        costs.part = Mean()
        costs.scaling = SCALED_BY if requests > PROBE_REQUESTS else 0

    def _seconds(self, costs: _Costs, requests: int, drafts: int) -> float:
        return max(1e-9, costs.plain.value + max(0.0, drafts * requests * costs.row.value) + costs.wait.value)

    def _of(self, requests: int) -> _Costs:
        size = 1 << max(0, requests - 1).bit_length()
        if size not in self._costs:
            self._costs[size] = _Costs()
        return self._costs[size]


def _probe_steps(requests: int) -> int:
    return max(PROBE_LEAST, PROBE_ROWS // max(1, requests))
