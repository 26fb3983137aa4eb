"""Grammars are checked aside, each once, and no more of them wait than there is a limit for."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cluster.api import grammar as module
from cluster.api.grammar import MAX_CHECKING, Grammars
from cluster.api.schema import CompletionRequest
from cluster.contracts import GrammarSpec
from cluster.errors import OverloadedError, RequestError

WITHIN_S = 20.0


class Gate:
    """A check that waits until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.checked: list[GrammarSpec] = []

    def __call__(self, spec: GrammarSpec) -> None:
        assert self.open.wait(WITHIN_S)
        self.checked.append(spec)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch):
    gate = Gate()
    monkeypatch.setattr(module, "check", gate)
    yield gate
    gate.open.set()


def asking(**structured: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "p", "structured_outputs": structured})


def run(body) -> None:
    async def bounded() -> None:
        grammars = Grammars()
        try:
            async with asyncio.timeout(WITHIN_S):
                await body(grammars)
        finally:
            grammars.close()

    asyncio.run(bounded())


async def started(grammars: Grammars, *requests: CompletionRequest) -> list[asyncio.Task[GrammarSpec | None]]:
    tasks = [asyncio.create_task(grammars.of(request)) for request in requests]
    await asyncio.sleep(0)  # each as far as its first wait
    return tasks


def test_one_more_than_can_wait_is_told_to_come_later_and_the_others_are_answered(gate):
    async def body(grammars: Grammars) -> None:
        tasks = await started(grammars, *(asking(regex=f"a{i}") for i in range(MAX_CHECKING)))
        with pytest.raises(OverloadedError, match="try again later"):
            await grammars.of(asking(regex="b"))
        gate.open.set()
        assert await asyncio.gather(*tasks) == [GrammarSpec("regex", f"a{i}") for i in range(MAX_CHECKING)]
        assert await grammars.of(asking(regex="b")) == GrammarSpec("regex", "b")

    run(body)


def test_many_requests_of_one_grammar_cost_one_check_though_the_first_client_leaves(gate):
    async def body(grammars: Grammars) -> None:
        first, *others = await started(grammars, *(asking(regex="a+") for _ in range(9)))
        first.cancel()
        gate.open.set()
        assert set(await asyncio.gather(*others)) == {GrammarSpec("regex", "a+")}
        assert await grammars.of(asking(regex="a+")) == GrammarSpec("regex", "a+")
        assert gate.checked == [GrammarSpec("regex", "a+")]

    run(body)


def test_a_grammar_is_converted_aside_and_only_if_it_is_not_too_long(monkeypatch):
    here = threading.current_thread()
    seen: list[threading.Thread] = []

    def convert(text: str) -> str:
        seen.append(threading.current_thread())
        return 'start: "a"'

    monkeypatch.setattr(module, "any_to_lark", convert)

    async def body(grammars: Grammars) -> None:
        assert await grammars.of(asking(grammar='root ::= "a"')) == GrammarSpec("lark", 'start: "a"')
        with pytest.raises(RequestError, match="at most"):
            await grammars.of(asking(grammar="x" * 200_000))
        assert [thread is here for thread in seen] == [False]

    run(body)
