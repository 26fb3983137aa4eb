"""Conversations of several turns through one engine with a prefix cache and one without: hits, first tokens, tau."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from transformers import AutoTokenizer

from cluster.contracts import Delta, EngineRequest
from deploy.link import make_link
from paceline.bench import prompts as prompt_files
from paceline.bench.errors import BenchError
from verifier_service.config import VerifierSettings
from verifier_service.engine import Engine
from verifier_service.rank import build_engine, build_runner

ANSWER_S = 300.0
FOLLOW_UP_TOKENS = 24  # what a user adds in each turn: the beginning of another prompt


@dataclass(frozen=True)
class CacheOptions:
    """conversations of `turns` turns each, one request at a time, max_tokens new tokens a turn."""

    target: Path
    drafter: Path
    conversations: int = 4
    turns: int = 4
    max_tokens: int = 48
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class CacheRow:
    """first_token_ms: median over turns after the first. tau: tokens a verify step of those turns.

    hit_rate: of all prompt tokens, how many were found; text_equal: of the turns, how many say what the other row says.
    """

    name: str
    turns: int
    hit_rate: float
    first_token_ms: float
    tau: float
    text_equal: float


@dataclass
class _Answer:
    """One turn as its client sees it."""

    token_ids: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    cached: int = 0
    first_s: float | None = None
    error: str | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.token_ids:
                if self.first_s is None:
                    self.first_s = time.perf_counter()
                self.cached += delta.cached
                self.token_ids += delta.token_ids
                self.steps.append(len(delta.token_ids))
            if delta.finish is not None:
                self.error = delta.error
                self.over.set()


@dataclass(frozen=True)
class _Turn:
    first: bool
    prompt_tokens: int
    cached: int
    first_token_s: float
    token_ids: tuple[int, ...]
    steps: tuple[int, ...]


def measure(options: CacheOptions, advance: Callable[[int, str], None]) -> list[CacheRow]:
    """Rows "with prefix cache" and "without", their turns interleaved. Raises BenchError, or as the engine's start."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.target, local_files_only=True)
    prompts = [prompt.render(tokenizer) for prompt in prompt_files.read(prompt_files.SHIPPED)]
    names = {True: "with prefix cache", False: "without"}
    turns: dict[bool, list[_Turn]] = {True: [], False: []}
    with ExitStack() as stack:
        engines = {cached: _start(options, cached) for cached in names}
        for engine in engines.values():
            stack.callback(engine.stop)
        for cached, engine in engines.items():
            _ask(engine, f"warm-up-{cached}", list(prompts[-1]), options.max_tokens, True)
        for number in range(options.conversations):
            histories = {cached: list(prompts[number % len(prompts)]) for cached in names}
            for turn in range(options.turns):
                for cached in (True, False) if (number + turn) % 2 else (False, True):
                    said = _ask(engines[cached], f"{number}-{turn}", histories[cached], options.max_tokens, turn == 0)
                    turns[cached].append(said)
                    more = prompts[(number + turn + 1) % len(prompts)][:FOLLOW_UP_TOKENS]
                    histories[cached] += [*said.token_ids, *more]
                    advance(1, f"{names[cached]}: {said.cached} of {said.prompt_tokens} tokens found")
    return [_row(names[cached], turns[cached], turns[not cached]) for cached in (True, False)]


def table(rows: Sequence[CacheRow]) -> Table:
    made = Table(title="Conversations, one turn at a time", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("", "turns", "hit rate", "first token ms", "ratio", "tau", "text equal"):
        made.add_column(heading, justify="right" if heading else "left")
    slowest = max(row.first_token_ms for row in rows)
    for row in rows:
        made.add_row(
            row.name,
            str(row.turns),
            f"{row.hit_rate:.0%}",
            f"{row.first_token_ms:.1f}",
            f"{row.first_token_ms / slowest:.2f}",
            f"{row.tau:.2f}",
            f"{row.text_equal:.0%}",
        )
    return made


def _start(options: CacheOptions, prefix_cache: bool) -> Engine:
    settings = VerifierSettings.model_validate(
        {
            "target": str(options.target),
            "drafter": str(options.drafter),
            "dtype": options.dtype,
            "device": options.device,
            "max_requests": 4,
            "kv_cache_tokens": 16384,
            "prefix_cache": prefix_cache,
            "checkpoint_bytes": 256 << 20,
            "speculation": {"mode": "colocated", "adaptive": False, "soft_deadline_s": 10},
        }
    )
    engine = build_engine(settings, build_runner(settings), None, "bench-cache", make_link)
    engine.start()
    return engine


def _ask(engine: Engine, name: str, prompt: list[int], max_tokens: int, first: bool) -> _Turn:
    answer = _Answer()
    began = time.perf_counter()
    engine.submit(EngineRequest(name, tuple(prompt), seed=1, max_new_tokens=max_tokens), answer.take)
    if not answer.over.wait(ANSWER_S):
        raise BenchError(f"a request had not ended after {ANSWER_S:g} s")
    if answer.error is not None or answer.first_s is None:
        raise BenchError(f"the engine ended a request: {answer.error or 'no reason given'}")
    return _Turn(
        first, len(prompt), answer.cached, answer.first_s - began, tuple(answer.token_ids), tuple(answer.steps)
    )


def _row(name: str, turns: list[_Turn], others: list[_Turn]) -> CacheRow:
    later = [turn for turn in turns if not turn.first]
    steps = [count for turn in later for count in turn.steps[1:]]  # the first token is the prefill's
    return CacheRow(
        name=name,
        turns=len(turns),
        hit_rate=sum(turn.cached for turn in turns) / sum(turn.prompt_tokens for turn in turns),
        first_token_ms=1000 * statistics.median(turn.first_token_s for turn in later),
        tau=sum(steps) / len(steps),
        text_equal=sum(turn.token_ids == other.token_ids for turn, other in zip(turns, others)) / len(turns),
    )
