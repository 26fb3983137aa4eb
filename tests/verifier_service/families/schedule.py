"""An adversarial client and drafter in one process with the engine, seeded: the same steps every time.

Everything happens on the engine's thread, between two steps: requests arrive, are aborted, and resume with what they
had been given; every request is drafted for, right up to a random point and wrong after it.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cluster.contracts import Delta, EngineRequest
from tests.verifier_service.model.tiny_targets import VOCABULARY
from verifier_service.engine import Engine
from verifier_service.model.face import ForwardOutput, ModelShape, Runner
from verifier_service.plan import StepPlan
from verifier_service.proposers.plain import NoProposer
from verifier_service.sequence import Progress

PROMPTS = 7
LONGEST_PROMPT = 44
OUTPUT = 24
MOST_DRAFTS = 7
BLOCK_TOKENS = 4
SLOTS = 4
DRAFTED, RESTED = 12, 8  # steps
TAPS = (1, 0)  # in this order

Texts = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]  # prompt and what the target says after it


def prompts(seed: int) -> list[tuple[int, ...]]:
    """Some begin as others do, up to a random point."""
    rng = random.Random(seed)
    made: list[tuple[int, ...]] = []
    for _ in range(PROMPTS):
        shared = made[-1][: rng.randrange(LONGEST_PROMPT - 8)] if made and rng.random() < 0.5 else ()
        own = rng.randint(1, LONGEST_PROMPT - len(shared))
        made.append((*shared, *(rng.randrange(VOCABULARY) for _ in range(own))))
    return made


@dataclass(frozen=True)
class Ask:
    """A request: text number `text`, cut at `limit` tokens or a stop token.

    aborts_at: after so many tokens, None = never; resumes: later, keeping what it had but the last `forgets` tokens.
    """

    name: str
    text: int
    limit: int
    stops: frozenset[int]
    aborts_at: int | None
    resumes: bool
    forgets: int


@dataclass(frozen=True)
class Row:
    """What the target computed for one token of an output: float32 logits [vocabulary], tap layers' outputs."""

    logits: torch.Tensor
    taps: torch.Tensor


def asks(texts: Texts, seed: int) -> list[Ask]:
    """One for each text and, for some, a second one that begins while the cache may still know the first."""
    rng = random.Random(seed)
    made = []
    for index, (_, text) in enumerate([*texts, *texts[:2]]):
        made.append(
            Ask(
                name=f"r{index}",
                text=index % len(texts),
                limit=rng.randint(OUTPUT // 2, OUTPUT),
                stops=frozenset({text[rng.randrange(OUTPUT // 2, OUTPUT)]}) if rng.random() < 0.3 else frozenset(),
                aborts_at=rng.randrange(OUTPUT // 2) if rng.random() < 0.5 else None,
                resumes=rng.random() < 0.7,
                forgets=rng.choice((0, 0, 1, 3)),
            )
        )
    rng.shuffle(made)
    return made


class Watched:
    """A runner that remembers the outputs of the last two steps, one of which may not be read yet."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self.shape: ModelShape = runner.shape
        self._last: deque[ForwardOutput] = deque(maxlen=2)
        self.spoke = False  # has ever given logits or taps

    def forward(self, plan: StepPlan) -> ForwardOutput:
        output = self._runner.forward(plan)
        self.spoke |= output.logits is not None or output.taps is not None
        self._last.append(output)
        return output

    def logits_beside(self, taps: torch.Tensor) -> torch.Tensor:
        """Of the step that these taps are from."""
        return next(output.logits for output in self._last if output.taps is taps and output.logits is not None)

    def feed(self, tokens: torch.Tensor) -> None:
        self._runner.feed(tokens)

    def set_taps(self, layer_ids: Sequence[int]) -> None:
        self._runner.set_taps(layer_ids)

    def counters(self) -> Mapping[str, float]:
        return self._runner.counters()


@dataclass
class _Open:
    ask: Ask
    tokens: list[int] = field(default_factory=list)
    aborted: bool = False  # an abort is under way or done


class Client:
    """Submits, aborts and resumes. A sink; `outputs` and `finishes` by name are complete once `done` is set."""

    def __init__(self, texts: Texts, seed: int):
        self._texts, self._random = texts, random.Random(seed + 1)
        self._waiting: list[_Open] = [_Open(ask) for ask in asks(texts, seed)]
        self._active: dict[str, _Open] = {}
        self.outputs: dict[str, list[int]] = {}
        self.finishes: dict[str, str] = {}
        self.rows: dict[tuple[str, int], Row] = {}
        self.asks: Mapping[str, Ask] = {waiting.ask.name: waiting.ask for waiting in self._waiting}
        self.done = threading.Event()
        self._engine: Engine | None = None

    def begin(self, engine: Engine) -> None:
        self._engine = engine
        for _ in range(3):
            self._submit()

    def act(self) -> None:
        """Between two steps."""
        assert self._engine is not None
        for name, request in self._active.items():
            at = request.ask.aborts_at
            if at is not None and len(request.tokens) >= at and not request.aborted:
                request.aborted = True
                self._engine.abort(name)
        if self._random.random() < 0.4:
            self._submit()

    def text_of(self, name: str) -> tuple[int, ...]:
        return self._texts[self.asks[name].text][1]

    def __call__(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            request = self._active[delta.request_id]
            request.tokens += delta.token_ids
            if delta.finish is not None:
                self._finish(delta.request_id, delta.finish if delta.error is None else f"error: {delta.error}")
        if not self._active:
            self._submit()  # nothing runs, and so nobody would call act

    def _finish(self, name: str, finish: str) -> None:
        request = self._active.pop(name)
        self.outputs[name], self.finishes[name] = request.tokens, finish
        if finish == "abort" and request.ask.resumes and request.ask.aborts_at is not None:
            kept = request.tokens[: max(0, len(request.tokens) - request.ask.forgets)]
            for index in range(len(kept), len(request.tokens)):
                self.rows.pop((name, index), None)
            again = _Open(request.ask, kept, aborted=True)
            self._waiting.insert(self._random.randrange(len(self._waiting) + 1), again)
        if not self._active and not self._waiting:
            self.done.set()

    def _submit(self) -> None:
        if not self._waiting:
            return
        assert self._engine is not None
        request = self._waiting.pop(0)
        ask = request.ask
        self._active[ask.name] = request
        self._engine.submit(
            EngineRequest(
                ask.name,
                self._texts[ask.text][0],
                seed=0,
                max_new_tokens=ask.limit,
                generated_ids=tuple(request.tokens),
                stop_token_ids=ask.stops,
                priority=self._random.randrange(2),
            ),
            self,
        )


class Adversary(NoProposer):
    """Drafts 0..7 tokens for every request and step, right up to a random point; keeps what the target computed.

    rests: there are stretches of steps without drafts.
    """

    tap_layers = TAPS

    def __init__(self, client: Client, runner: Watched, seed: int, rests: bool):
        self._client, self._runner, self._rests = client, runner, rests
        self._steps = 0
        self._random = random.Random(seed + 2)
        self._ready: list[Progress] = []

    def resting(self) -> bool:
        return self._rests and self._steps % (DRAFTED + RESTED) >= DRAFTED

    def advance(self, progress: Sequence[Progress], taps: torch.Tensor | None) -> None:
        assert taps is not None
        logits = self._runner.logits_beside(taps)
        for p in progress:
            name = p.sequence.request.request_id
            first = p.sequence.generated - len(p.token_ids)
            for i in range(len(p.token_ids)):
                at = p.row + (
                    i if p.drafted else p.kept - 1
                )  # without drafts it is the last row of a chunk, or the only
                self._client.rows[name, first + i] = Row(logits[p.logit_row + i].clone(), taps[at].clone())
        self._ready = [p for p in progress if p.token_ids and not p.finish]

    def collect(self) -> float:
        self._steps += 1
        for p in [] if self.resting() else self._ready:
            text = self._client.text_of(p.sequence.request.request_id)
            count = self._random.randint(0, MOST_DRAFTS)
            drafts = list(text[p.sequence.generated :][:count])
            right = self._random.randint(0, count)
            drafts[right:] = [self._random.randrange(VOCABULARY) for _ in range(count - right)]
            p.sequence.drafts = tuple(drafts)
        self._client.act()
        return 0.0
