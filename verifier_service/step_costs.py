"""What steps cost, measured on the steps themselves and smooth in their size: pure policy, in seconds.

Tables of steps that were measured before (StepPrior) are what it begins with, and give way to what is measured here.
"""

from __future__ import annotations

from verifier_service.step_tables.prior import StepPrior

WEIGHT = 0.1  # of a new sample, once there are ten
SLOWEST_STEP, SLOWEST_WAIT = 2.0, 4.0  # times the usual: what takes longer counts as one of so many
TOLD = 2  # samples, by which something is slow
ROW_SHARE = 0.125  # of a plain step's share of one request, that a draft costs where nothing is measured yet

PRIOR_SAMPLES = 2  # that a prior counts as; of plain steps, by which all gain and loss is told, it counts as none
PRIOR_SIZES = tuple(1 << power for power in range(11))  # requests


class Curve:
    """y(x) for x >= 1: a straight line through the running means of octaves (1, 2, 3-4, 5-8, ..).

    So a size that was never measured begins from its neighbours. from_zero: y(0) = 0, and samples are differences that
    may be negative. Otherwise y is flat below the first octave, a sample counts as `slowest` times the mean at most,
    and the first of an octave may be far too slow (something compiled, or was caught up): the lower of two counts.
    """

    def __init__(self, slowest: float = 0.0, from_zero: bool = False):
        self._slowest, self._from_zero = slowest, from_zero
        self._means: dict[int, list[float]] = {}  # octave -> [x, y, samples]
        self._line: list[list[float]] = []
        self._expected = 0  # samples of each octave that are a prior's

    def add(self, x: float, y: float) -> None:
        mean = self._means.get(octave(x))
        if mean is None:
            self._means[octave(x)] = [x, y, 1.0]
            self._line = [self._means[key] for key in sorted(self._means)]
            return
        mean[2] += 1
        if mean[2] == 1:
            mean[0], mean[1] = x, y
            return
        weight = max(WEIGHT, 1 / mean[2])
        mean[0] += weight * (x - mean[0])
        if self._from_zero:
            mean[1] += weight * (y - mean[1])
        elif mean[2] == 2:
            mean[1] = min(mean[1], y)
        else:
            mean[1] += weight * (min(y, self._slowest * mean[1]) - mean[1])

    def begin(self, x: float, y: float, samples: int) -> None:
        """What is expected of x's octave before anything is measured, which counts as so many samples; 0: as none, so
        that the first one replaces it.
        """
        self._means[octave(x)] = [x, y, float(samples)]
        self._line = [self._means[key] for key in sorted(self._means)]
        self._expected = samples

    def doubt(self, x: float) -> None:
        """What is known of larger x goes half of the way down to what x, measured just now, says of them; and weighs
        little.

        In proportion for differences; otherwise that they take no longer.
        """
        base = self._means.get(octave(x))
        if base is None:
            return
        for key, mean in self._means.items():
            likely = max(0.0, base[1] * mean[0] / base[0]) if self._from_zero else base[1]
            if key > octave(x) and mean[1] > likely:
                mean[1], mean[2] = (mean[1] + likely) / 2, min(mean[2], self._expected + 2.0)

    def samples(self, x: float) -> int:
        """Of x's own octave; of a prior too."""
        mean = self._means.get(octave(x))
        return 0 if mean is None else int(mean[2])

    def measured(self, x: float) -> int:
        """The same without those of a prior."""
        return max(0, self.samples(x) - self._expected)

    @property
    def reach(self) -> float:
        """The largest x that was measured, about; 0 = none."""
        return max((x for x, _, samples in self._line if samples > self._expected), default=0.0)

    def at(self, x: float) -> float:
        """y(x), 0 if nothing is measured. Beyond the last octave as between the last two; from one alone, as below."""
        line = self._line
        if not line:
            return 0.0
        if x <= line[0][0] or len(line) == 1:
            return line[0][1] * x / line[0][0] if self._from_zero else line[0][1]
        last = len(line) - 1
        right = 1
        while right < last and line[right][0] < x:
            right += 1
        (x0, y0, _), (x1, y1, _) = line[right - 1], line[right]
        slope = (y1 - y0) / (x1 - x0)
        return y1 + max(0.0, slope) * (x - x1) if x > x1 else y0 + slope * (x - x0)

    def __bool__(self) -> bool:
        return bool(self._line)


class StepCosts:
    """plain: of a step without drafts, by requests. wait: to ask for so many requests' drafts and to wait for them.

    loaded: plain steps that held prefill too, which stand in where there are no others. most: drafts of a request.
    """

    def __init__(self, most: int, prior: StepPrior | None = None) -> None:
        self._prior = prior
        self._plain, self._loaded = Curve(SLOWEST_STEP), Curve(SLOWEST_STEP)
        self._extra: dict[int, Curve] = {}  # octave of requests -> seconds beyond plain, by drafts of all requests
        self.wait = Curve(SLOWEST_WAIT)
        if prior is not None:
            self._expect(prior, most)

    def plain_step(self, requests: int, seconds: float, prefilled: bool) -> None:
        (self._loaded if prefilled else self._plain).add(requests, seconds)

    def drafted_step(self, requests: int, drafted: int, seconds: float) -> float:
        """`drafted` > 0 drafts in all, no prefill. Returns the seconds that count."""
        plain = self.plain(requests)
        curve = self._extra.setdefault(octave(requests), Curve(from_zero=True))
        if curve.measured(drafted) >= TOLD:  # before, it may well be that slow: nothing that is lost is to go unseen
            seconds = min(seconds, SLOWEST_STEP * (plain + self.extra(requests, drafted)))
        curve.add(drafted, seconds - plain)
        return seconds

    def measured(self, requests: int) -> int:
        """Plain steps of about so many requests."""
        return self._plain.measured(requests) or self._loaded.measured(requests)

    def bare(self, requests: int) -> bool:
        """Whether plain steps of about so many requests are known that held no prefill."""
        return self._plain.samples(requests) > 0

    def plain(self, requests: int) -> float:
        """0 = unknown. As long as all that were measured held prefill, no more than a prior says."""
        if self._plain.measured(requests) or not self._loaded:
            return self._plain.at(requests)
        loaded = self._loaded.at(requests)
        return min(loaded, self._plain.at(requests)) if self._prior is not None else loaded

    def extra(self, requests: int, drafted: float) -> float:
        """Of so many drafts in all, beyond a plain step; where batches of this size had none, as in the nearest."""
        if not self._extra:
            return ROW_SHARE * drafted * self.plain(requests) / requests
        size = octave(requests)
        curve = self._extra.get(size) or self._extra[min(self._extra, key=lambda other: abs(other - size))]
        return max(0.0, curve.at(drafted))

    def one_more_wait(self, asked: int) -> float:
        """Seconds that one of so many asks adds; as long as no fewer were ever measured, half its share."""
        if asked == 1:
            return self.wait.at(1)
        fewer = asked // 2
        if not self.wait.samples(fewer):
            return self.wait.at(asked) / asked / 2
        return max(0.0, self.wait.at(asked) - self.wait.at(fewer)) / (asked - fewer)

    def doubt(self, requests: int, asked: int, drafted: int) -> None:
        """So many asks and drafts paid just now: what larger ones cost was measured long ago, if they seem not to."""
        self.wait.doubt(asked)
        if (extra := self._extra.get(octave(requests))) is not None:
            extra.doubt(drafted)

    def forget_waits(self) -> None:
        """Another drafter."""
        self.wait = Curve(SLOWEST_WAIT)
        if self._prior is not None:
            self._expect_waits(self._prior)

    def _expect(self, prior: StepPrior, most: int) -> None:
        for requests in PRIOR_SIZES:
            self._plain.begin(requests, prior.plain(requests), samples=0)
            curve = self._extra[octave(requests)] = Curve(from_zero=True)
            for drafts in (*(size for size in PRIOR_SIZES if size < most), most):
                curve.begin(drafts * requests, prior.extra(requests, drafts * requests), PRIOR_SAMPLES)
        self._expect_waits(prior)

    def _expect_waits(self, prior: StepPrior) -> None:
        for requests in PRIOR_SIZES:
            if (seconds := prior.wait(requests)) is not None:
                self.wait.begin(requests, seconds, PRIOR_SAMPLES)


def octave(x: float) -> int:
    """1, 2, 3-4, 5-8, ..: 0, 1, 2, 3, .."""
    return (int(x + 0.5) - 1).bit_length()
