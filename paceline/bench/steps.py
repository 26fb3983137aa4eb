"""Step tables of a running pair: what a verify step takes by requests, rows and context, and what drafts take.

As an engine's own control sees them: with all ranks, its host's work, the link and whatever else this machine does.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.api.engine_client import EngineClient, EngineStream
from cluster.contracts import Configure, EngineRequest, SetDrafters, Status
from deploy.local import LocalDrafter, LocalGang
from modeling.dflash_config import DFlashConfig
from modeling.target_config import read_target_config
from paceline.bench.engine_decoder import ANSWER_S, LINK_S, POLL_S, growth
from paceline.bench.engine_rows import START_S, EngineSetup
from paceline.bench.errors import BenchError
from paceline.bench.machine import describe

RUN_S = 300.0
MOST_WAIT_S = 10.0  # for drafts: none is to be missed here
DRAFTED = 0.9  # of what was asked for has to be verified, or rows are not what they are taken for


@dataclass(frozen=True)
class StepsOptions:
    """concurrency: requests at once. rows: tokens of each in a step (bonus and drafts); empty = powers of two up to a
    whole block. contexts: tokens of prompt. steps: of each measurement, of which `repeats` are made, interleaved.
    """

    target: Path
    drafter: Path
    concurrency: tuple[int, ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    tensor_parallel: int
    device: str
    dtype: str
    steps: int = 24
    repeats: int = 3

    def sizes(self, block_size: int) -> list[tuple[int, int, int]]:
        """(requests, rows, context) of all measurements."""
        rows = self.rows or tuple(sorted({*(1 << i for i in range(block_size.bit_length() - 1)), block_size}))
        return [(n, each, context) for context in self.contexts for n in self.concurrency for each in rows]


def measure(options: StepsOptions, advance: Callable[[int, str], None]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of the target and of the drafter, as deploy/steps/README.md describes them. Raises PacelineError."""
    block = DFlashConfig.load(options.drafter).block_size
    sizes = options.sizes(block)
    if wrong := [rows for _, rows, _ in sizes if not 1 <= rows <= block]:
        raise BenchError(f"--rows {wrong[0]} is not between 1 and {block}, the drafter's block size")
    setup = EngineSetup(
        target=options.target,
        drafter=options.drafter,
        tensor_parallel=options.tensor_parallel,
        dtype=options.dtype,
        kv_dtype="auto",
        device=options.device,
        requests=max(options.concurrency),
        context=max(options.contexts) + (options.steps + 4) * block,
        temperature=0.0,
        stop_token_ids=frozenset(),
    )
    found: dict[tuple[int, int, int], list[tuple[float, float]]] = {size: [] for size in sizes}
    with ExitStack() as stack:
        drafter = stack.enter_context(LocalDrafter(setup.draft_service(), start_timeout_s=START_S))
        settings = setup.verifier("disaggregated", adaptive=False, soft_deadline_s=MOST_WAIT_S)
        gang = stack.enter_context(LocalGang(settings, engine_id="bench-steps", start_timeout_s=START_S))
        runner = stack.enter_context(asyncio.Runner())
        timed = runner.run(_Timed.connect(gang.address, drafter.address))
        for repeat in range(options.repeats):
            for size in sizes:
                found[size].append(runner.run(timed.run(*size, options.steps, f"{repeat}")))
                advance(1, f"{size[0]} x {size[1]}")
        timed.client.close()
    return _tables(options, block, {size: _median(runs) for size, runs in found.items()})


def write(out: Path, tables: Sequence[dict[str, Any]]) -> list[Path]:
    """OUT/SHAPE.json each."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{table['shape']}.json" for table in tables]
    for path, table in zip(paths, tables):
        path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return paths


@dataclass
class _Timed:
    client: EngineClient

    @classmethod
    async def connect(cls, engine: str, drafter: str) -> _Timed:
        client = await EngineClient.connect(engine, ANSWER_S)
        client.send(SetDrafters((drafter,)))
        until = time.monotonic() + LINK_S
        while not (await client.probe(ANSWER_S)).linked:
            if time.monotonic() > until:
                raise BenchError(f"no link to the drafter after {LINK_S:g} s")
            await asyncio.sleep(POLL_S)
        return cls(client)

    async def run(self, requests: int, rows: int, context: int, steps: int, name: str) -> tuple[float, float]:
        """Seconds of a step without the wait for drafts, and of that wait; means over steps without prefill."""
        self.client.send(Configure(max_draft_tokens=rows - 1))
        streams = [
            self.client.submit(_request(f"steps-{name}-{rows}-{context}-{index}", context, (steps + 4) * rows))
            for index in range(requests)
        ]
        try:
            async with asyncio.timeout(RUN_S):
                for stream in streams:
                    await _hear(stream, 2)  # the first is of its prefill, which is counted after it was told
                before = await self.client.probe(ANSWER_S)
                await _hear(streams[0], steps)
                after = await self.client.probe(ANSWER_S)
        except TimeoutError:
            raise BenchError(f"{requests} requests with {rows} rows did not decode within {RUN_S:g} s") from None
        finally:
            for stream in streams:
                stream.close()
        await self._idle()
        return _seconds(before, after, requests, rows)

    async def _idle(self) -> None:
        until = time.monotonic() + ANSWER_S
        while (await self.client.probe(ANSWER_S)).running:
            if time.monotonic() > until:
                raise BenchError(f"aborted requests were still running after {ANSWER_S:g} s")
            await asyncio.sleep(POLL_S)


async def _hear(stream: EngineStream, steps: int) -> None:
    """So many of its Deltas, one a step. Raises BenchError if the engine ends it before."""
    async for delta in stream:
        if delta.error is not None:
            raise BenchError(f"the engine ended a request: {delta.error}")
        steps -= 1
        if steps <= 0 or delta.finish is not None:
            return


def _request(name: str, context: int, tokens: int) -> EngineRequest:
    prompt = tuple(random.Random(name).choices(range(4, 200), k=context))
    return EngineRequest(name, prompt, 0, tokens, cache_salt=name)


def _seconds(before: Status, after: Status, requests: int, rows: int) -> tuple[float, float]:
    grown = {name: growth(before, after, name) or 0.0 for name in after.counters}
    steps, verified = grown["steps"], grown["verify_rows"]
    if grown["prefill_tokens"] or verified < requests * (steps - 2):  # counters are read while a step is counted
        raise BenchError(
            f"{requests} requests did not all decode while they were measured ({verified:g} rows in {steps:g} steps): "
            "give fewer --steps, or a longer context to the target"
        )
    if grown["drafted_tokens"] < DRAFTED * verified * (rows - 1):
        raise BenchError(f"only {grown['drafted_tokens']:g} drafts were verified in {verified:g} rows of {rows} tokens")
    wait = grown["draft_seconds"] / steps
    return grown["step_seconds"] / steps - wait, wait


def _median(runs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(step for step, _ in runs), statistics.median(wait for _, wait in runs)


def _tables(
    options: StepsOptions, block: int, found: dict[tuple[int, int, int], tuple[float, float]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    machine = describe()
    where = {
        "format": 1,
        "device": machine["gpu"] or machine["processor"],
        **{key: machine[key] for key in ("cores", "load_before", "python", "torch", "transformers")},
        "date": datetime.date.today().isoformat(),
        "dtype": options.dtype,
    }
    name = options.target.resolve().name
    verify = [
        {"requests": n, "rows": rows, "context": context, "seconds": step}
        for (n, rows, context), (step, _) in found.items()
    ]
    draft = [
        {"contexts": n, "rows": rows, "window": context, "seconds": wait}
        for (n, rows, context), (_, wait) in found.items()
        if rows > 1
    ]
    layers = read_target_config(options.target).layers
    ranks = {"clock": "engine", "ranks": options.tensor_parallel, "layers": layers}
    return (
        {**where, "shape": name, **ranks, "verify": verify},
        {**where, "shape": f"{name}-dflash", "clock": "link", "block_size": block, "draft": draft},
    )
