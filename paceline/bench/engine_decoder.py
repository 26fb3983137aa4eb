"""The rows that are Paceline's own engine: its ranks in processes of their own, spoken to over the engine port."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from cluster.api.engine_client import EngineClient
from cluster.contracts import Delta, EngineRequest, SamplingParams, SetDrafters, Status
from paceline.bench.errors import BenchError
from paceline.bench.runs import Output, Run
from verifier_service.tally import gap_share

ANSWER_S = 30.0
LINK_S = 60.0
REQUEST_S = 900.0
POLL_S = 0.05


@dataclass
class Collector:
    """The Deltas of one request as an Output. The first holds the prefill's token, each later one a step's."""

    token_ids: list[int] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Raises BenchError if the engine gave the request up."""
        if delta.finish not in (None, "stop", "length"):
            raise BenchError(f"the engine ended a request with {delta.finish!r}: {delta.error or 'no reason given'}")
        if not delta.token_ids:
            return
        if self.token_ids:
            self.commits.append(len(delta.token_ids))
        self.token_ids += delta.token_ids

    def output(self) -> Output:
        return Output(tuple(self.token_ids), tuple(self.commits))


class EngineDecoder:
    """One running engine at `address`. Seeds are the prompts' indices, the same for every row. Owns an event loop.

    drafted: it uses a drafter; remote: that is in another process, so that bytes cross the link.
    """

    def __init__(
        self,
        name: str,
        note: str,
        address: str,
        stop_token_ids: frozenset[int],
        temperature: float,
        drafted: bool,
        remote: bool,
    ):
        self.name, self.note = name, note
        self._stop_token_ids, self._drafted, self._remote = stop_token_ids, drafted, remote
        self._sampling = SamplingParams(temperature=temperature)
        self._runs = itertools.count()
        self._loop = asyncio.Runner()
        self._client = self._loop.run(EngineClient.connect(address, ANSWER_S))

    def link_to(self, drafter: str) -> None:
        """drafter: "host:port". Raises BenchError if it is not linked within LINK_S seconds."""
        self._client.send(SetDrafters((drafter,)))
        self._loop.run(self._linked())

    def run(self, prompts: Sequence[tuple[int, ...]], concurrency: int, max_tokens: int) -> Run:
        return self._loop.run(self._run(prompts, concurrency, max_tokens))

    def close(self) -> None:
        self._client.close()
        self._loop.close()

    async def _run(self, prompts: Sequence[tuple[int, ...]], concurrency: int, max_tokens: int) -> Run:
        run = next(self._runs)
        outputs: dict[int, Output] = {}
        waiting = iter(enumerate(prompts))

        async def client() -> None:
            for index, prompt in waiting:
                outputs[index] = await self._one(f"bench-{run}-{index}", index, prompt, max_tokens, f"run-{run}")

        before = await self._client.probe(ANSWER_S)
        started = perf_counter()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(client())
        except ExceptionGroup as several:  # all for the same reason: the engine's
            raise BenchError(f"{self.name}: {several.exceptions[0]}") from several
        seconds = perf_counter() - started
        after = await self._client.probe(ANSWER_S)
        return Run(
            seconds=seconds,
            outputs=tuple(outputs[index] for index in range(len(prompts))),
            draft_seconds=growth(before, after, "draft_seconds") if self._drafted else None,
            step_seconds=growth(before, after, "step_seconds"),
            gap_share=gap_share(before.counters, after.counters),
            link_bytes=growth(before, after, "link_bytes") if self._remote else None,
            context_tokens=growth(before, after, "context_tokens") if self._remote else None,
        )

    async def _one(self, request_id: str, seed: int, prompt: tuple[int, ...], max_tokens: int, salt: str) -> Output:
        request = EngineRequest(
            request_id=request_id,
            prompt_ids=prompt,
            seed=seed,
            max_new_tokens=max_tokens,
            sampling=self._sampling,
            stop_token_ids=self._stop_token_ids,
            cache_salt=salt,
        )
        collector = Collector()
        try:
            async with asyncio.timeout(REQUEST_S):
                with self._client.submit(request) as stream:
                    async for delta in stream:
                        collector.add(delta)
        except TimeoutError:
            raise BenchError(f"a request had not ended after {REQUEST_S:g} s") from None
        return collector.output()

    async def _linked(self) -> None:
        until = time.monotonic() + LINK_S
        while not (await self._client.probe(ANSWER_S)).linked:
            if time.monotonic() > until:
                raise BenchError(f"{self.name}: no link to the drafter after {LINK_S:g} s")
            await asyncio.sleep(POLL_S)


def growth(before: Status, after: Status, counter: str) -> float | None:
    """None if this engine does not count that."""
    if counter not in after.counters:
        return None
    return after.counters[counter] - before.counters.get(counter, 0.0)
