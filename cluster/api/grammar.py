"""What clients ask the output to be, as one grammar: OpenAI's response_format and vLLM's structured_outputs."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from llguidance.gbnf_to_lark import any_to_lark

from cluster.api.schema import SamplingFields, StructuredOutputs
from cluster.contracts import GrammarSpec
from cluster.errors import RequestError
from cluster.grammar import GrammarError, check

KEPT = 256  # grammars known to be good
ANY_OBJECT = json.dumps({"type": "object"})


class Grammars:
    """Checks grammars on a thread of its own, so that no other request waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-check")
        self._good: OrderedDict[GrammarSpec, None] = OrderedDict()

    async def of(self, request: SamplingFields) -> GrammarSpec | None:
        """None if the output is free. Raises RequestError, which names the client's field."""
        field, spec = _asked(request)
        if spec is None or spec in self._good:
            return spec
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, check, spec)
        except GrammarError as error:
            raise RequestError(f"{field} {error}", field) from error
        self._good[spec] = None
        if len(self._good) > KEPT:
            self._good.popitem(last=False)
        return spec

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


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
        return "structured_outputs.grammar", GrammarSpec("lark", _lark(asked.grammar))
    return "structured_outputs.json_object", GrammarSpec("json_schema", ANY_OBJECT)


def _lark(text: str) -> str:
    """GBNF, as llama.cpp has it, becomes Lark."""
    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises what its parser meets
        field = "structured_outputs.grammar"
        raise RequestError(f"{field} is neither Lark nor GBNF: {error}", field) from error
