"""When to draft, for whom, and how many drafts to verify: pure policy on plain values, no torch.

Maximises committed tokens a second. A step of n requests that asks for the drafts of m of them and verifies d has to
make

    (n + drafts expected to be right) / (plain(n) + extra(n, d) + wait(m))

more than n / plain(n), which is plain decoding. All times are measured here, on the steps themselves (StepCosts).

How many will be right is known from the drafter's confidence, calibrated by what became of it (Calibration). Of each
answer those drafts are verified that all stand with at least the chance `least`: the one number that makes the rate
above largest for the latest answers. So an easy request gets many rows and a hard one few, in the same step. A request
whose drafts are not worth even the asking is not asked for a while (Trust).

What drafting gains and loses against plain steps is booked as it happens (Allowance). While that account is empty there
are no drafts: this bounds the loss, whatever the estimates say and whatever drafters and links do. What is left in it
pays for probes: short ones, of different text, at doubling distances while they lose.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

from verifier_service.allowance import SHARE, Allowance
from verifier_service.calibration import Calibration
from verifier_service.step_costs import SLOWEST_WAIT, StepCosts, octave
from verifier_service.step_tables.prior import StepPrior

PLAIN_FIRST = 3  # plain steps of a batch size before the first drafts
LOOK = 4  # drafted steps before a plain one while all plain ones held prefill and so tell little; then twice as many
START, STAY = 1.05, 1.01  # drafting has to promise so much over plain decoding, to begin and to go on: estimates err
PLAIN_EVERY, PLAIN_OFTEN, OFTEN_BELOW = 64, 16, 1.2  # drafted steps between two plain ones; if it promises less than
WHOLE_EVERY = 64  # asks between two whose answers are verified whole: far positions and many rows stay known
PROBE_REQUESTS = 8  # are asked for in a probe, at most: the others' features would have to be sent first
PROBE_ROWS, PROBE_LEAST = 3, 2  # requests that a probe asks for in all; asks that it takes at least
PROBE_DRAFTS = 2  # of each answer are verified in a probe, however unlikely: else nothing would be learned
PROBE_PRICE = 2.0  # plain steps' time has to be left for a probe
FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # choices between two probes, doubling while they lose
RECHECK = 32  # choices until a batch size at which drafting does not pay is thought of again
REMEMBERED, KEPT = 64, 2  # answers; of them, when a new probe begins
REMEMBERED_OF_STEP, JUDGED = 8, 16  # answers of one step, about, the others' turn comes in the next ones
SURVEY_EVERY = 8  # choices that use the same picture of the answers; fewer while there are few answers
THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.0)
TRUST_WEIGHT, BEYOND_WEIGHT = 0.2, 0.05  # of a request's latest drafts: what they promise, and whether they keep it
FIRST_TRUST, NEXT_TRUST = 1.0, 0.3  # of a request that is new; that was not asked for a while
DISTRUST = 32  # choices for which a request is not asked
UNKNOWN_S = 1e-9


@dataclass(slots=True)
class Trust:
    """What one request's drafts are worth: tokens an ask, less what their rows and its share of the wait cost.

    promised: as their confidence has it, calibrated for all requests alike. beyond: how many more were right than that.
    """

    promised: float = FIRST_TRUST
    beyond: float = 0.0
    asked_from: int = 0  # choice


@dataclass(frozen=True, slots=True)
class _Plan:
    """worth: tokens a second over plain decoding's. row_price, ask_price: of one more, in tokens."""

    worth: float = 0.0
    least: float = 0.1
    row_price: float = 0.0
    ask_price: float = 0.0


@dataclass(slots=True)
class _Size:
    """One batch size. first: plain steps left before any drafts; rest_until: the choice that is open again.

    active: drafting, or probing whether to draft; since then, earned: plain steps' time, and probe_only: no drafts but
    those of a probe. Pauses are a size's own: what drafting gains at another is no reason to probe at this one, since
    what the answers are worth is known to all. look: see LOOK.
    """

    first: int = PLAIN_FIRST
    rest_until: int = 0
    since_plain: int = 0
    active: bool = False
    earned: float = 0.0
    probe_only: bool = False
    look: int = LOOK
    probe_at: int = 0  # choice
    pause: int = FIRST_PAUSE


class SpeculationControl:
    """One engine's. most: block size - 1. prior: what steps should cost, until they are measured. Batch sizes are
    requests rounded up to a power of two.

    A step of the engine calls, in this order: `verified` for each request whose drafts it has verified, `choose`,
    `kept` with the answers that have come and `waited` if drafts were asked for, `step`.
    """

    def __init__(self, most: int, prior: StepPrior | None = None):
        self.most = most
        self.ask_at_most = 1 << 30  # requests, as of the last choice
        self._costs, self._allowance, self._calibration = StepCosts(most, prior), Allowance(), Calibration(most)
        self._sizes: dict[int, _Size] = {}
        self._choices = 0
        self._plan = _Plan()
        self._rows = 0  # drafts of the last step that had any
        self._probing = 0  # asks left whatever they promise
        self._asked = 0
        self._answers: deque[Sequence[float]] = deque(maxlen=REMEMBERED)
        self._survey: list[tuple[float, float, float]] = []
        self._survey_until = 0
        self._deepest = float(most)  # drafts of one answer that were worth verifying, lately
        self._free_wait = False

    def choose(self, requests: int, willing: int | None = None) -> int:
        """Drafts to ask for each of at most `ask_at_most` requests; 0 = none. Call once a step.

        requests: in the next step. willing: of those that can be asked for, how many `trusts` allows; None = all.
        """
        self._choices += 1
        self.ask_at_most = requests
        size = self._of(requests)
        if self._choices < size.rest_until:
            return 0
        if size.first > 0:
            size.first -= 1
            return 0
        if self._probing and self._allowance.left > 0:
            self.ask_at_most = PROBE_REQUESTS
            return self.most
        self._probing = 0
        self._plan = self._planned(requests, requests if willing is None else max(willing, 1))
        if self._plan.worth >= (STAY if size.active else START) and self._allowance.left > 0:
            return self._draft(size, requests, willing)
        self._stop(size, requests)
        if self._choices >= size.probe_at:
            size.active = size.probe_only = True
            self._probing = max(PROBE_LEAST, PROBE_ROWS // requests)
            while len(self._answers) > KEPT:
                self._answers.popleft()
            self.ask_at_most = PROBE_REQUESTS
            return self.most
        size.rest_until = min(self._choices + RECHECK, size.probe_at)
        return 0

    def rests(self, requests: int) -> bool:
        """Whether the next `choose` says 0, as far as can be known."""
        size = self._of(requests)
        return size.first > 0 or self._choices + 1 < size.rest_until

    @property
    def probing(self) -> bool:
        """Whether the last choice asks anyone, trusted or not."""
        return self._probing > 0

    def trusts(self, trust: Trust) -> bool:
        """Whether a request should be asked for, outside probes."""
        return trust.asked_from <= self._choices

    def longest_wait(self, requests: int) -> float:
        """Seconds after which drafts have come too late to pay, were they all right."""
        return self.most * self._costs.plain(requests) or float("inf")

    def waited(self, requests: int, asked: int, seconds: float, missed: int = 0) -> None:
        """`asked` requests' drafts were asked for and waited for; `missed` of them did not come in time."""
        if self._probing:
            self._probing -= 1
            self._survey_until = 0
        self._asked += 1
        for _ in range(min(missed, REMEMBERED_OF_STEP)):
            self._answers.append(())
        free, self._free_wait = self._free_wait, False
        if free:
            return
        usual = self._costs.wait.at(asked) if self._costs.wait.measured(asked) else seconds
        self._costs.wait.add(asked, seconds)
        if plain := self._costs.plain(requests):
            self._allowance.passed(seconds / plain)
            self._book(requests, -min(seconds, max(SLOWEST_WAIT * usual, self.most * plain)) / plain)

    def kept(self, trusts: Sequence[Trust], answers: Sequence[Sequence[float]]) -> list[int]:
        """How many drafts of each answer to verify. answers: the confidences of each one's drafts, in order."""
        probing, least = self._probing > 0, self._plan.least
        if self._asked >= WHOLE_EVERY:
            self._asked, least = 0, 0.0
        kept = self._calibration.kept(answers, least)
        if probing:
            kept = [max(count, min(PROBE_DRAFTS, len(answer))) for count, answer in zip(kept, answers)]
        first, stride = self._sample(len(answers), JUDGED)
        for index in range(first, len(answers), stride):
            self._judge(trusts[index], kept[index], answers[index])
        self._deepest = max(self._deepest - 0.05, max(kept, default=0))
        first, stride = self._sample(len(answers), REMEMBERED_OF_STEP)
        self._answers.extend(answers[first::stride])
        return kept

    def verified(self, trust: Trust, confidence: Sequence[float], drafted: int, accepted: int) -> None:
        """One request's row: `accepted` of `drafted` drafts were right; the first wrong one ends what is known.

        confidence: of those drafts.
        """
        self._calibration.learn(confidence, drafted, accepted)
        trust.beyond += BEYOND_WEIGHT * (accepted - self._calibration.right(confidence, drafted) - trust.beyond)

    def step(self, requests: int, drafted: int, accepted: int, seconds: float, prefilled: bool = False) -> None:
        """A step verified `drafted` drafts of `requests` requests, `accepted` of them right; waits left out."""
        costs = self._costs
        plain = costs.plain(requests)
        self._allowance.passed(seconds / plain if plain else 1.0)
        if not drafted:
            costs.plain_step(requests, seconds, prefilled)
        elif plain:
            self._rows = drafted
            extra = (
                costs.extra(requests, drafted) if prefilled else costs.drafted_step(requests, drafted, seconds) - plain
            )
            self._book(requests, accepted / requests - extra / plain)

    def renew(self) -> None:
        """Another drafter. (Another life of the link to the same one changes nothing that is known.)"""
        self._calibration = Calibration(self.most)
        self._costs.forget_waits()
        self._answers.clear()
        self._survey.clear()
        self._survey_until, self._deepest = 0, float(self.most)
        self._probing = 0
        anew = self._free_wait = self._allowance.begin_anew()
        for size in self._sizes.values():
            size.active, size.earned, size.pause = False, 0.0, FIRST_PAUSE
            if anew:
                size.rest_until = size.probe_at = 0

    def expected(self, least: float) -> float:
        """Drafts that are right, of an answer of which those that all stand with this chance are verified."""
        return next((right for limit, _, right in self._surveyed() if limit <= least), 0.0)

    def _draft(self, size: _Size, requests: int, willing: int | None) -> int:
        size.active, size.probe_only = True, False
        size.since_plain += 1
        every = PLAIN_OFTEN if self._plan.worth < OFTEN_BELOW else PLAIN_EVERY
        bare = self._costs.bare(requests)
        if size.since_plain >= (every if bare else min(every, size.look)):
            size.since_plain = 0
            size.look *= 1 if bare else 2
            return 0
        if willing == 0:
            return 0
        self.ask_at_most = max(PROBE_REQUESTS, int(2 * self._costs.wait.reach))
        return min(self.most, int(self._deepest) + 2)

    def _stop(self, size: _Size, requests: int) -> None:
        """Drafting does not pay now. When is it probed again?"""
        if size.active:
            if size.probe_only and size.earned > 0:  # of few requests it does: nothing else would tell that all would
                self._costs.doubt(requests, min(PROBE_REQUESTS, requests), self._rows)
            size.pause = FIRST_PAUSE if size.earned > 0 else min(2 * size.pause, LONGEST_PAUSE)
            size.probe_at = self._choices + size.pause
            size.active, size.earned = False, 0.0
        if (lacking := PROBE_PRICE - self._allowance.left) > 0:
            size.probe_at = max(size.probe_at, self._choices + 1 + int(lacking / SHARE))

    def _planned(self, requests: int, asked: int) -> _Plan:
        costs = self._costs
        plain = costs.plain(requests)
        wait = costs.wait.at(asked)
        best, least, chosen_rows, chosen_extra = 0.0, 0.1, 0.0, 0.0
        for threshold, rows, right in self._surveyed():
            extra = costs.extra(requests, rows * asked) if rows else 0.0
            rate = (requests + right * asked) / max(plain + extra + wait, UNKNOWN_S)
            if rate > best:
                best, least, chosen_rows, chosen_extra = rate, threshold, rows * asked, extra
        # A request has so many tokens to go, so one of its own is worth the time that it would take it without drafts.
        per_second = requests / max(plain + (1 - 1 / asked) * (chosen_extra + wait), UNKNOWN_S)
        row_price = per_second * chosen_extra / chosen_rows if chosen_rows else 0.0
        return _Plan(best * plain / requests, least, row_price, per_second * costs.one_more_wait(asked))

    def _surveyed(self) -> list[tuple[float, float, float]]:
        """(threshold, drafts verified, drafts right) of one answer, for each of THRESHOLDS."""
        if self._choices >= self._survey_until and self._answers:
            self._survey_until = self._choices + min(SURVEY_EVERY, len(self._answers))
            chances = sorted(chain.from_iterable(map(self._calibration.survivals, self._answers)))
            below, count, sums = len(self._answers), len(chances), [0.0, *accumulate(chances)]
            firsts = [bisect_left(chances, threshold) for threshold in THRESHOLDS]
            self._survey = [
                (threshold, (count - first) / below, (sums[-1] - sums[first]) / below)
                for threshold, first in zip(THRESHOLDS, firsts)
            ]
        return self._survey

    def _judge(self, trust: Trust, count: int, answer: Sequence[float]) -> None:
        net = self._calibration.right(answer, count) - count * self._plan.row_price - self._plan.ask_price
        trust.promised += TRUST_WEIGHT * (net - trust.promised)
        if trust.promised + trust.beyond < 0:
            trust.promised, trust.asked_from = NEXT_TRUST - trust.beyond, self._choices + DISTRUST

    def _sample(self, count: int, wanted: int) -> tuple[int, int]:
        """The first and the stride of about so many out of `count`, others in each step."""
        stride = 1 + count // (wanted + 1)
        return self._choices % stride, stride

    def _book(self, requests: int, steps: float) -> None:
        self._allowance.earn(steps)
        self._of(requests).earned += steps

    def _of(self, requests: int) -> _Size:
        key = octave(requests)
        if key not in self._sizes:
            self._sizes[key] = _Size()
        return self._sizes[key]
