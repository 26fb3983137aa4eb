"""Random events for a scheduler over the fake runner, with every invariant checked after every event.

Events: requests of three tenants that share beginnings, go on from earlier text, or resume; steps with drafts of any
quality; aborts. Blocks are scarce, so that requests are preempted and cached blocks evicted all the time.
"""

from __future__ import annotations

import random
from collections import Counter

from cluster.contracts import EngineRequest
from cluster.errors import OverloadedError
from tests.verifier_service.fake_runner import FakeModel, FakeRunner
from verifier_service.plan import StepPlan
from verifier_service.scheduler import Scheduler, SchedulerLimits
from verifier_service.sequence import RunningRequest

MODEL = FakeModel()
LONGEST = 44  # prompt tokens; with its output, a request takes 21 blocks at most
OUTPUT = 40
SALTS = ("", "red", "blue")


class Soak:
    """One scheduler's life. counts: what happened. Text is compared with the model's own at each request's end.

    ahead: steps are planned before the one before is committed, where that is possible; requests are drafted for in
    some stretches of steps only.
    """

    def __init__(
        self,
        seed: int,
        checkpoints: int | None,
        *,
        slots: int = 6,
        blocks: int = 24,
        step_tokens: int = 24,
        ahead: bool = False,
    ):
        self.random = random.Random(seed)
        self.limits = SchedulerLimits(slots, blocks, 4, step_tokens, 4, checkpoints=checkpoints)
        self.scheduler = Scheduler(self.limits)
        self.runner = FakeRunner(slots, blocks, 4, checkpoints=checkpoints)
        self.counts: Counter[str] = Counter()
        self.features: set[bytes] = set()  # pages beside named blocks, as a feature store keeps them
        self._texts: dict[str, list[list[int]]] = {salt: [] for salt in SALTS}
        self._names = 0
        self._ahead = ahead
        self._unread: list[int] | None = None  # samples of a step that is not committed yet

    def run(self, events: int) -> None:
        for _ in range(events):
            kind = self.random.random()
            if kind < 0.25:
                self._add()
            elif kind < 0.29:
                self._abort()
            else:
                self._step()
            self.check()
            self.counts["events"] += 1

    def drain(self) -> None:
        """To the end of every request, and a last plan, as a heartbeat makes it."""
        for _ in range(3000):
            if not len(self.scheduler) and self._unread is None:
                break
            self._step()
            self.check()
        assert not len(self.scheduler), "a request never ended"
        self.runner.forward(self.scheduler.plan())
        self.scheduler.commit([])
        self.check()
        assert self.scheduler.pool.free == self.limits.blocks

    def _add(self) -> None:
        salt = self.random.choice(SALTS)
        ids = self._prompt(salt)
        name = f"r{self._names}"
        output = self.random.randint(1, OUTPUT)
        generated = MODEL.greedy(ids, self.random.randrange(output)) if self.random.random() < 0.2 else []
        priority = self.random.choice((0, 0, 0, 1))
        stops = frozenset(MODEL.greedy(ids, OUTPUT)[-OUTPUT // 2 :][:1]) if self.random.random() < 0.3 else frozenset()
        request = EngineRequest(
            name,
            tuple(ids),
            1,
            output,
            generated_ids=tuple(generated),
            stop_token_ids=stops - set(generated),
            cache_salt=salt,
            priority=priority,
        )
        try:
            self.scheduler.add(request)
        except OverloadedError:
            return
        self._names += 1
        self.counts["added"] += 1
        self.counts["resumed"] += bool(generated)

    def _prompt(self, salt: str) -> list[int]:
        """Often the beginning, or all, of an earlier text of the same tenant."""
        known = self._texts[salt]
        beginning: list[int] = []
        if known and self.random.random() < 0.7:
            text = self.random.choice(known)
            beginning = text[: self.random.choice((len(text), self.random.randint(1, len(text))))]
        room = max(1, LONGEST - len(beginning))
        more = self.random.choice((0, 1, self.random.randint(1, room)))
        ids = (beginning + [self.random.randrange(64) for _ in range(more)])[:LONGEST]
        return ids or [1]

    def _step(self) -> None:
        if self._unread is None:
            self._draft()
            self._forward(self.scheduler.plan())
            if self._ahead:
                return
        unread, self._unread = self._unread, None
        if self._ahead and (plan := self.scheduler.plan_ahead()) is not None:
            self.counts["ahead"] += 1
            self._forward(plan)
        assert unread is not None
        self._commit(unread)
        if self.random.random() < 0.1:
            self._draft()  # late ones, for requests whose next token may be under way

    def _draft(self) -> None:
        if self._ahead and self.counts["steps"] // 16 % 2:
            return
        for sequence in self.scheduler.requests():
            if sequence.slot >= 0 and sequence.computed == len(sequence.tokens) - 1:
                guesses = MODEL.greedy(sequence.tokens, self.random.randrange(8))
                right = self.random.choice((0.0, 0.6, 1.0))
                sequence.drafts = tuple(g if self.random.random() < right else (g + 1) % 64 for g in guesses)

    def _forward(self, plan: StepPlan) -> None:
        self.counts["steps"] += 1
        self.counts["restored"] += len(plan.restored)
        self.counts["saved"] += len(plan.saved) + sum(chunk.checkpoint >= 0 for chunk in plan.prefill)
        self.features.difference_update(self.scheduler.cache.take_evicted())
        used = sum(len(row.token_ids) for row in plan.verify) + sum(len(chunk.token_ids) for chunk in plan.prefill)
        assert used <= self.limits.step_tokens
        assert all(chunk.token_ids for chunk in plan.prefill)
        logits = self.runner.forward(plan).logits
        assert logits is not None
        samples = logits.argmax(-1)
        self.runner.feed(samples)
        self._unread = samples.tolist()

    def _commit(self, samples: list[int]) -> None:
        for progress in self.scheduler.commit(samples):
            sequence = progress.sequence
            filled = progress.start // 4, (progress.start + progress.kept) // 4
            self.features.update(sequence.hashes[slice(*filled)])
            if progress.finish is not None:
                self._finished(sequence)

    def _finished(self, sequence: RunningRequest) -> None:
        self.counts["finished"] += 1
        request = sequence.request
        text = MODEL.greedy(request.prompt_ids, request.max_new_tokens)
        ends = [at + 1 for at, token in enumerate(text) if token in request.stop_token_ids]
        text = text[: ends[0] if ends else None]
        self.counts["stopped"] += len(text) < request.max_new_tokens
        assert sequence.tokens == [*request.prompt_ids, *text], "a hit changed the text"
        known = self._texts[request.cache_salt]
        known.append(sequence.tokens)
        del known[:-8]

    def _abort(self) -> None:
        held = self.scheduler.requests()
        if held:
            self.scheduler.remove(self.random.choice(held).key)
            self.counts["aborted"] += 1

    def check(self) -> None:
        scheduler, limits = self.scheduler, self.limits
        held, pool, checkpoints = scheduler.requests(), scheduler.pool, scheduler.cache.checkpoints
        owned = Counter(block for sequence in held for block in sequence.blocks)
        assert all(pool.users(block) == owned[block] for block in range(limits.blocks))
        assert pool.free == limits.blocks - len(owned)
        slots = [sequence.slot for sequence in held if sequence.slot >= 0]
        assert len(slots) == len(set(slots)) == scheduler.running <= limits.slots
        assert self._unread is not None or checkpoints.taken == 0, "a checkpoint is written to by no step"
        assert 0 <= checkpoints.kept <= checkpoints.total
        moving = [sequence.moving for sequence in held if sequence.moving is not None]
        assert len(moving) == len(set(moving)) <= checkpoints.total // 2
        for sequence in held:
            if sequence.slot < 0:
                assert (sequence.blocks, sequence.named, sequence.moving, sequence.splits) == ([], 0, None, [])
        # What was evicted since the last step is told with the next.
        pending = set(scheduler.cache.evicted)
        assert {h for h in self.features - pending if pool.find(h) is None} == set()
