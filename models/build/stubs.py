"""Function stubs for a model to complete: imports, a signature, a docstring with or without examples.

Names, parameters and documentation are those of the standard library's training side; type annotations and examples are
made up from them at random, because the library has few of either. No benchmark's problem is used.
"""

from __future__ import annotations

import ast
import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from models.build import corpus

WORDINGS = (
    "Write a solution to the following problem and make sure that it passes the tests:\n{}",
    "Complete the following Python function:\n{}",
    "Implement this function.\n{}",
    "{}\nWrite the body of this function.",
    "Finish this Python code, so that it does what the docstring says:\n\n{}",
)
LONGEST_DOCUMENTATION = 420  # characters
TYPES = ("int", "float", "str", "bool", "List[int]", "List[str]", "List[float]", "Dict[str, int]", "Tuple[int, int]")
MODULES = ("import math\n", "import re\n", "import collections\n", "from collections import Counter\n")
CALLS = ("{call} == {value}", "{call} -> {value}", "{call} ➞ {value}", "{call} => {value}", "{call} returns {value}")
HEADINGS = ("Example:", "Examples:", "For example:", "Example 1:", "")


@dataclass(frozen=True)
class Documented:
    """A function's name, the names of its parameters, and its docstring without indentation."""

    name: str
    parameters: tuple[str, ...]
    documentation: str


def documented(held_out: bool) -> list[Documented]:
    """The documented functions of one side of the split, methods among them (without self)."""
    return [function for text in corpus.texts(held_out) for function in _functions(text)]


def stub(function: Documented, rng: random.Random) -> str:
    """Source that ends after the docstring of `function`; the same `rng` state gives the same text."""
    typed = rng.random() < 0.5
    kinds = [rng.choice(TYPES) for _ in function.parameters]
    result = rng.choice(TYPES)
    quotes = '"""' if rng.random() < 0.85 else "'''"
    signature = _signature(function, kinds, result) if typed else _signature(function)
    lines = _shortened(function.documentation, rng).splitlines() + _examples(function, kinds, result, rng)
    opening = rng.choice((" ", "", "\n"))
    body = textwrap.indent("\n".join(lines), "    ")
    body = "\n" + body if opening == "\n" else opening + body.lstrip()
    return f"{_imports(signature, rng)}{signature}\n    {quotes}{body}\n    {quotes}\n".replace("\\", "/")


def request(code: str, rng: random.Random) -> str:
    """What a user asks about a stub: the stub in a fence, in one of several wordings (the first is HumanEval's own)."""
    fence = f"```python\n{code}{rng.choice(('', '', chr(10)))}```"
    return rng.choices(WORDINGS, weights=(4, 1, 1, 1, 1))[0].format(fence)


def _functions(text: str) -> Iterator[Documented]:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (documentation := ast.get_docstring(node)):
            parameters = tuple(a.arg for a in node.args.args if a.arg not in ("self", "cls"))
            if len(documentation) >= 20 and len(parameters) <= 5:
                yield Documented(node.name, parameters, documentation)


def _signature(function: Documented, kinds: list[str] | None = None, result: str = "") -> str:
    if kinds is None:
        return f"def {function.name}({', '.join(function.parameters)}):"
    typed = ", ".join(f"{name}: {kind}" for name, kind in zip(function.parameters, kinds))
    return f"def {function.name}({typed}) -> {result}:"


def _imports(signature: str, rng: random.Random) -> str:
    """What the annotations need, sometimes a module, sometimes the blank lines that stand where imports were."""
    used = [name for name in ("Dict", "List", "Tuple") if name + "[" in signature]
    head = f"from typing import {', '.join(used)}\n" if used else ""
    if rng.random() < 0.15:
        head = rng.choice(MODULES) + head
    return head + "\n\n" if head or rng.random() < 0.3 else ""


def _shortened(documentation: str, rng: random.Random) -> str:
    """Whole lines up to a random length; the first line always, and examples of its own only if they fit."""
    room = rng.randrange(60, LONGEST_DOCUMENTATION)
    kept: list[str] = []
    for line in documentation.splitlines():
        room -= len(line)
        if kept and room < 0:
            break
        kept.append(line[:120])
    return "\n".join(kept).rstrip()


def _examples(function: Documented, kinds: list[str], result: str, rng: random.Random) -> list[str]:
    style = rng.choices(("none", "prompt", "call"), weights=(3, 4, 4))[0]
    if style == "none":
        return []
    lines = [""] if rng.random() < 0.4 else []
    form = rng.choice(CALLS)
    if style == "call" and (heading := rng.choice(HEADINGS)):
        lines.append(heading)
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        call = f"{function.name}({', '.join(_value(kind, rng) for kind in kinds)})"
        value = _value(result, rng)
        lines += [f">>> {call}", value] if style == "prompt" else [form.format(call=call, value=value)]
    return lines


def _value(kind: str, rng: random.Random) -> str:
    """A literal of a type of TYPES."""
    match kind:
        case "int":
            return str(rng.choice((rng.randrange(10), rng.randrange(-20, 200))))
        case "float":
            return str(round(rng.uniform(0, 10), 1))
        case "bool":
            return rng.choice(("True", "False"))
        case "str":
            length = rng.randrange(0, 9)
            return repr("".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(length)))
        case "Dict[str, int]":
            return repr({rng.choice("abcdefgh"): rng.randrange(10) for _ in range(rng.randrange(1, 4))})
        case "Tuple[int, int]":
            return f"({rng.randrange(10)}, {rng.randrange(10)})"
        case _:
            inner = kind.removeprefix("List[").removesuffix("]")
            return f"[{', '.join(_value(inner, rng) for _ in range(rng.randrange(0, 6)))}]"
