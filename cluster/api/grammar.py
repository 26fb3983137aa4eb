"""What clients ask the output to be, as one grammar: OpenAI's response_format and vLLM's structured_outputs."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from llguidance.gbnf_to_lark import any_to_lark

from cluster.api.schema import SamplingFields, StructuredOutputs
from cluster.contracts import GrammarSpec
from cluster.errors import OverloadedError, RequestError
from cluster.grammar import GrammarError, check, check_length

KEPT = 256  # grammars known to be good
MAX_CHECKING = 64  # different grammars that wait at a time; each takes up to a second
ANY_OBJECT = json.dumps({"type": "object"})
WRITTEN = "structured_outputs.grammar"  # Lark or GBNF


class Grammars:
    """Checks grammars on a thread of its own, so that no other request waits for it, each of them once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._good: OrderedDict[tuple[str, GrammarSpec], GrammarSpec] = OrderedDict()
        self._checking: dict[tuple[str, GrammarSpec], asyncio.Future[GrammarSpec]] = {}

    async def of(self, request: SamplingFields) -> GrammarSpec | None:
        """None if the output is free. Raises RequestError, which names the client's field, or OverloadedError."""
        field, asked = _asked(request)
        if asked is None:
            return None
        if (good := self._good.get((field, asked))) is not None:
            return good
        checking = self._checking.get((field, asked))
        if checking is None:
            checking = self._begin(field, asked)
        try:
            return await asyncio.shield(checking)  # others may wait for the same one
        except GrammarError as error:
            raise RequestError(f"{field} {error}", field) from error

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, field: str, asked: GrammarSpec) -> asyncio.Future[GrammarSpec]:
        if len(self._checking) >= MAX_CHECKING:
            raise OverloadedError(f"{MAX_CHECKING} grammars wait to be checked, which is the limit: try again later")
        key = (field, asked)
        checking = asyncio.get_running_loop().run_in_executor(self._thread, _checked, field, asked)
        self._checking[key] = checking
        checking.add_done_callback(lambda done: self._end(key, done))
        return checking

    def _end(self, key: tuple[str, GrammarSpec], checked: asyncio.Future[GrammarSpec]) -> None:
        del self._checking[key]
        if checked.cancelled() or checked.exception() is not None:
            return
        self._good[key] = checked.result()
        if len(self._good) > KEPT:
            self._good.popitem(last=False)


def _checked(field: str, asked: GrammarSpec) -> GrammarSpec:
    """What the engine is to be given. Raises GrammarError."""
    check_length(asked)
    spec = GrammarSpec("lark", _lark(asked.text)) if field == WRITTEN else asked
    check(spec)
    return spec


def _asked(request: SamplingFields) -> tuple[str, GrammarSpec | None]:
    """The client's name of the field, and its grammar."""
    form, structured = request.response_format, request.structured_outputs
    if structured is not None:
        return _structured(structured)
    if form.type == "json_object":
        return "response_format", GrammarSpec("json_schema", ANY_OBJECT)
    if form.json_schema is not None:
        return "response_format.json_schema.schema", GrammarSpec("json_schema", json.dumps(form.json_schema.schema_))
    return "response_format", None


def _structured(asked: StructuredOutputs) -> tuple[str, GrammarSpec]:
    if asked.json_ is not None:
        text = asked.json_ if isinstance(asked.json_, str) else json.dumps(asked.json_)
        return "structured_outputs.json", GrammarSpec("json_schema", text)
    if asked.regex is not None:
        return "structured_outputs.regex", GrammarSpec("regex", asked.regex)
    if asked.choice is not None:
        either = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in asked.choice)
        return "structured_outputs.choice", GrammarSpec("lark", f"start: {either}")
    if asked.grammar is not None:
        return WRITTEN, GrammarSpec("lark", asked.grammar)
    return "structured_outputs.json_object", GrammarSpec("json_schema", ANY_OBJECT)


def _lark(text: str) -> str:
    """GBNF, as llama.cpp has it, becomes Lark. Raises GrammarError."""
    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises what its parser meets
        raise GrammarError(f"is neither Lark nor GBNF: {error}") from error
