"""Speculation control in simulated engines: `python -m tests.verifier_service.control_scenarios` prints the table.

Deterministic: virtual time, seeded. For each scenario the throughput under the control, over plain decoding's and over
that of the best fixed number of drafts for all requests (of the batch sizes as they come).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from verifier_service.control import SpeculationControl, Trust

MOST = 7
LIFE = (60, 260)  # tokens of a request
SURE = 6.0  # how far apart the chances of drafts of one text lie: less is further


@dataclass(frozen=True)
class Costs:
    """Seconds: of a plain step of n requests, beyond it with d drafts in all, of waiting for m requests' drafts."""

    name: str
    plain: Callable[[int], float]
    extra: Callable[[int, int], float]
    wait: Callable[[int], float]
    catch_up: float = 20e-6  # for each token that a request asked for has to bring first


CPU = Costs("cpu", lambda n: 3.5e-3 + 0.6e-3 * n, lambda n, d: 0.5e-3 * d, lambda m: 2.5e-3 + 0.6e-3 * m)
GPU = Costs(
    "gpu",
    lambda n: 20e-3 + 20e-6 * n,
    lambda n, d: 5e-6 * d + 0.12e-3 * (max(0, n + d - 96) - max(0, n - 96)),
    lambda m: 1.5e-3 + 15e-6 * m,
    catch_up=1e-6,
)


@dataclass(frozen=True)
class Drafter:
    """right: what its drafts' chances are multiplied by. tells: its confidence is the chance; else it is `sure`.

    slow: factor of its waits. late: never in time. flaps: seconds of an epoch; others: each epoch is another drafter.
    """

    name: str
    right: float = 1.0
    tells: bool = True
    sure: float = 0.5
    slow: float = 1.0
    late: bool = False
    flaps: float = 0.0
    others: bool = False


GOOD = Drafter("good")
MUTE = Drafter("mute", tells=False)
BAD = Drafter("bad", right=0.35)
GARBAGE = Drafter("garbage", right=0.0, tells=False, sure=0.97)
SLOW = Drafter("slow", slow=12.0)
LATE = Drafter("late", late=True)
FLAPPING = Drafter("flapping", flaps=2.0)
MANY = Drafter("many garbage", right=0.0, tells=False, sure=0.97, flaps=2.0, others=True)
DRAFTERS = (GOOD, MUTE, BAD, GARBAGE, SLOW, LATE, FLAPPING, MANY)

EASY, HARD = 0.85, 0.25  # chance of a draft, all before it in its block being right
TEXTS: dict[str, tuple[tuple[float, float], ...]] = {  # for slot i: the chances that it alternates between
    "easy": ((EASY, EASY),),
    "hard": ((HARD, HARD),),
    "alternating": ((HARD, EASY),),
    "mixed": ((EASY, EASY), (HARD, HARD)),
}
HICCUP = 0.005  # of steps take three times as long; the mean is as `Costs` says
TURN = 150  # tokens, after which alternating text changes


@dataclass(frozen=True)
class Scenario:
    """sizes: of the batch, one after the other, each for as long as `steps` plain steps in all say."""

    costs: Costs
    drafter: Drafter
    text: str
    sizes: tuple[int, ...]
    steps: int = 4000

    @property
    def name(self) -> str:
        return f"{self.costs.name:4} {self.drafter.name:13} {self.text:12} {','.join(map(str, self.sizes))}"

    def wait(self, asked: int) -> float:
        return self.costs.wait(asked) * self.drafter.slow

    def plain_rate(self, n: int) -> float:
        return n / self.costs.plain(n)

    def fixed_rate(self, n: int, k: int) -> float:
        """Tokens a second, with k drafts for each request in every step."""
        if self.drafter.late and k:
            return 0.0
        taus = []
        for slot in range(n):
            pair = TEXTS[self.text][slot % len(TEXTS[self.text])]
            means = [sum((p * self.drafter.right) ** i for i in range(k + 1)) for p in pair]
            taus.append(2 / sum(1 / tau for tau in means))
        wait = self.wait(n) if k else 0.0
        return sum(taus) / (self.costs.plain(n) + self.costs.extra(n, n * k) + wait)

    def best_rate(self, n: int) -> float:
        return max(self.fixed_rate(n, k) for k in range(MOST + 1))

    def over_time(self, rate: Callable[[int], float]) -> float:
        return sum(map(rate, self.sizes)) / len(self.sizes)


@dataclass(slots=True, eq=False)
class Request:
    left: int
    chances: tuple[float, float]
    trust: Trust = field(default_factory=Trust)
    tokens: int = 0
    unsent: int = 0
    phase: int = 0  # where in the alternation it begins, in tokens
    drafts: tuple[tuple[float, float], ...] = ()  # chance and confidence of each draft to be verified

    @property
    def chance(self) -> float:
        return self.chances[(self.phase + self.tokens) // TURN % 2]


@dataclass(frozen=True)
class Outcome:
    """Seconds and tokens, and the tokens that plain decoding would have made. lost: most seconds behind it, ever."""

    seconds: float
    tokens: int
    plain_tokens: float
    best_tokens: float

    @property
    def over_plain(self) -> float:
        return self.tokens / self.plain_tokens

    @property
    def over_best(self) -> float:
        return self.tokens / self.best_tokens


class Engine:
    """Steps of the scenario's batch under a control, as the link proposer and the engine take them."""

    def __init__(self, scenario: Scenario, control: SpeculationControl, seed: int = 0):
        self.scenario, self.control, self.rng = scenario, control, random.Random(seed)
        self.slots: list[Request] = []
        self.epoch_ends = 0.0
        self.now = 0.0
        self.requests = 0  # of the step before

    def run(self) -> Outcome:
        tokens, plain, best = 0, 0.0, 0.0
        scenario = self.scenario
        for n in scenario.sizes:
            until = self.now + scenario.steps / len(scenario.sizes) * scenario.costs.plain(n)
            began = self.now
            while self.now < until:
                tokens += self.step(n)
            plain += (self.now - began) * scenario.plain_rate(n)
            best += (self.now - began) * scenario.best_rate(n)
        return Outcome(self.now, tokens, plain, best)

    def step(self, n: int) -> int:
        """Forward, learn, choose, ask, wait. Returns the tokens of the step."""
        costs, control, rng = self.scenario.costs, self.control, self.rng
        del self.slots[n:]
        while len(self.slots) < n:
            self.slots.append(self.fresh(len(self.slots)))
        drafted = sum(len(request.drafts) for request in self.slots)
        forward = (costs.plain(n) + costs.extra(n, drafted)) * rng.uniform(0.95, 1.05)
        forward *= (3 if rng.random() < HICCUP else 1) / (1 + 2 * HICCUP)
        self.now += forward
        right = 0
        for slot, request in enumerate(self.slots):
            accepted = 0
            if drafts := request.drafts:
                while accepted < len(drafts) and rng.random() < drafts[accepted][0]:
                    accepted += 1
                control.verified(request.trust, [sure for _, sure in drafts], len(drafts), accepted)
                request.drafts = ()
            right += accepted
            request.tokens += 1 + accepted
            request.unsent += 1 + accepted
            if request.tokens >= request.left:
                self.slots[slot] = self.fresh(slot)
        self.draft(n)
        control.step(n, drafted, right, forward)
        return n + right

    def draft(self, n: int) -> None:
        control, drafter = self.control, self.scenario.drafter
        if self.now >= self.epoch_ends:
            if drafter.others or not self.epoch_ends:
                control.renew()
            self.epoch_ends = self.now + drafter.flaps if drafter.flaps else float("inf")
            for request in self.slots:
                request.unsent = min(request.tokens + 40, 256)
        willing = [request for request in self.slots if control.trusts(request.trust)]
        k = control.choose(n, len(willing))
        if not k:
            return
        chosen = self.slots if control.probing else willing
        if len(chosen) > control.ask_at_most:
            chosen = sorted(chosen, key=lambda request: request.unsent)[: control.ask_at_most]
        if not chosen:
            return
        wait = self.scenario.wait(len(chosen)) * self.rng.uniform(0.9, 1.1)
        wait += self.scenario.costs.catch_up * sum(min(request.unsent, 256) for request in chosen)
        limit = min(0.25, control.longest_wait(n))
        for request in chosen:
            request.unsent = 0
        if drafter.late or wait > limit:
            self.now += limit
            control.waited(n, len(chosen), limit, missed=len(chosen))
            return
        self.now += wait
        drafts = [self.drafts(request, k) for request in chosen]
        kept = control.kept([request.trust for request in chosen], [[sure for _, sure in those] for those in drafts])
        for request, those, count in zip(chosen, drafts, kept):
            request.drafts = tuple(those[:count])
        control.waited(n, len(chosen), wait)

    def drafts(self, request: Request, k: int) -> list[tuple[float, float]]:
        drafter, rng = self.scenario.drafter, self.rng
        mean = request.chance
        found = []
        for _ in range(k):
            chance = rng.betavariate(SURE * mean, SURE * (1 - mean)) * drafter.right
            found.append((chance, chance if drafter.tells else drafter.sure))
        return found

    def fresh(self, slot: int) -> Request:
        texts = TEXTS[self.scenario.text]
        low, high = LIFE
        phase = self.rng.randrange(2 * TURN)
        return Request(self.rng.randint(low, high), texts[slot % len(texts)], unsent=40, phase=phase)


def scenarios(sizes: Sequence[tuple[int, ...]] = ((1,), (4,), (8,), (32,), (128,))) -> Iterator[Scenario]:
    for costs in (CPU, GPU):
        for size in sizes:
            for drafter in DRAFTERS:
                for text in TEXTS if drafter in (GOOD, MUTE) else ("alternating",):
                    yield Scenario(costs, drafter, text, size, 4000 if max(size) <= 8 else 3000)
        for drafter in (GOOD, GARBAGE, MANY):
            yield Scenario(costs, drafter, "mixed", (1, 8, 2, 32, 4, 16, 1, 32), 4000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="scenarios whose name has this in it")
    parser.add_argument("--steps", type=int, default=0, help="plain steps' time of each; 0 = its own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{'costs drafter      text         batch':44} of plain  of best  best/plain")
    for scenario in scenarios():
        if options.only not in scenario.name:
            continue
        if options.steps:
            scenario = replace(scenario, steps=options.steps)
        began = time.process_time()
        out = Engine(scenario, SpeculationControl(MOST), options.seed).run()
        gain = out.best_tokens / out.plain_tokens
        mark = " LOSS" if out.over_plain < 0.98 else " MISSED" if gain > 1.15 and out.over_best < 0.9 else ""
        spent = time.process_time() - began
        print(f"{scenario.name:44} {out.over_plain:8.3f} {out.over_best:8.3f} {gain:8.2f}  {spent:4.1f}s{mark}")


if __name__ == "__main__":
    main()
