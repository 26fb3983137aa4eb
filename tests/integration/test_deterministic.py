"""The shipped pair in deterministic mode, real processes, no Ray: one rank without a drafter says what two ranks say
whose drafter is killed in the middle, to the last bit of every log probability."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.api.engine_client import EngineClient
from cluster.contracts import EngineRequest, SamplingParams, SetDrafters, Status, TokenLogprobs
from deploy.local import LocalDrafter, LocalGang, LocalProcesses
from drafter_service.config import DrafterSettings
from tests.integration.test_exactness import PROMPTS
from verifier_service.config import VerifierSettings

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

OUTPUT = 96
PATIENCE_S = 300.0
Said = list[tuple[list[int], list[TokenLogprobs]]]


def test_two_ranks_whose_drafter_is_killed_say_the_bits_of_one_rank_without(checkpoints):
    from tokenizers import Tokenizer

    target, drafter = checkpoints
    encode = Tokenizer.from_file(str(target / "tokenizer.json")).encode
    prompts = [tuple(encode(text).ids) for text in PROMPTS]
    with LocalGang(settings(target, None, tensor_parallel_size=1, speculation={"mode": "none"})) as gang:
        expected = asyncio.run(said(gang.address, prompts[::-1]))[::-1]  # another order: other batches
    adaptive = {"mode": "disaggregated", "adaptive": False}
    common: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    draft_settings = DrafterSettings.model_validate({"checkpoint": str(drafter), "target": str(target), **common})
    with (
        LocalDrafter(draft_settings) as drafting,
        LocalGang(settings(target, drafter, tensor_parallel_size=2, speculation=adaptive)) as gang,
    ):
        got = asyncio.run(said(gang.address, prompts, drafting.address, lambda: kill(drafting)))
    assert got == expected


def settings(target: Path, drafter: Path | None, **changes: Any) -> VerifierSettings:
    return VerifierSettings.model_validate(
        {
            "target": str(target),
            "drafter": None if drafter is None else str(drafter),
            "deterministic": True,
            "dtype": "float32",
            "device": "cpu",
            "max_requests": 8,
            "kv_cache_tokens": 8192,
            **changes,
        }
    )


def kill(drafter: LocalProcesses) -> None:
    for pid in drafter.pids:
        os.kill(pid, signal.SIGKILL)


async def said(
    address: str, prompts: list[tuple[int, ...]], drafter: str | None = None, then: Callable[[], None] | None = None
) -> Said:
    """Of all prompts at once. then: called when some drafts were accepted."""
    engine = await EngineClient.connect(address, PATIENCE_S)
    try:
        async with asyncio.timeout(PATIENCE_S):
            if drafter is not None:
                engine.send(SetDrafters((drafter,)))
                await until(engine, lambda status: status.linked)
            asked = [asyncio.create_task(one(engine, prompt)) for prompt in prompts]
            if then is not None:
                await until(engine, lambda status: status.counters["accepted_tokens"] > 20)
                assert not all(task.done() for task in asked)
                then()
            return list(await asyncio.gather(*asked))
    finally:
        engine.close()


async def until(engine: EngineClient, holds: Callable[[Status], bool]) -> None:
    while not holds(await engine.probe(PATIENCE_S)):
        await asyncio.sleep(0.02)


async def one(engine: EngineClient, prompt: tuple[int, ...]) -> tuple[list[int], list[TokenLogprobs]]:
    sampling = SamplingParams(temperature=0.7 if len(prompt) % 2 else 0.0, top_p=0.95, logprobs=2)
    request = EngineRequest(f"r{hash(prompt)}", prompt, seed=len(prompt), max_new_tokens=OUTPUT, sampling=sampling)
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    async for delta in engine.submit(request):
        assert delta.error is None, delta.error
        tokens += delta.token_ids
        logprobs += delta.logprobs or ()
    return tokens, logprobs
