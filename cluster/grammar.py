"""Grammars that an output has to follow, as llguidance (https://github.com/guidance-ai/llguidance) takes them.

A router checks a grammar before it goes to an engine; the engine compiles it with its tokenizer. Both within LIMITS,
which bound time and memory whatever the text: about a second and some ten megabytes to compile, milliseconds a token
later. A grammar that goes beyond them in the middle of an output ends its request with an error.
"""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits

from cluster.contracts import GrammarSpec

MAX_CHARACTERS = 1 << 17
LIMITS = LLParserLimits(
    max_grammar_size=100_000,
    max_lexer_states=50_000,
    max_items_in_row=300,  # what one token may cost in a step that others wait for: milliseconds
    step_max_items=5_000,
    verbose_errors=False,
)
# Between the parts of a JSON text. The standard has no limit, and weak models would write nothing else to the end.
WHITESPACE = r"[ \n\r\t]{1,40}"
MAX_SHOWN = 300  # characters of the library's message


class GrammarError(ValueError):
    """A grammar that cannot be compiled; the message says why and names no field."""


def check_length(spec: GrammarSpec) -> None:
    """Raises GrammarError for a text that is too long to look at."""
    if len(spec.text) > MAX_CHARACTERS:
        raise GrammarError(f"has {len(spec.text)} characters: at most {MAX_CHARACTERS} are possible")


def source(spec: GrammarSpec) -> str:
    """The grammar as the library's own text. Raises GrammarError."""
    check_length(spec)
    try:
        match spec.kind:
            case "json_schema":
                return LLMatcher.grammar_from_json_schema(spec.text, defaults={"whitespace_pattern": WHITESPACE})
            case "regex":
                return LLMatcher.grammar_from_regex(spec.text)
            case "lark":
                return LLMatcher.grammar_from_lark(spec.text)
    except ValueError as error:
        raise GrammarError(told(str(error))) from error


def check(spec: GrammarSpec) -> None:
    """Takes up to a second, without holding the interpreter's lock. Raises GrammarError."""
    if problem := LLMatcher.validate_grammar(source(spec), limits=LIMITS):
        raise GrammarError(told(problem))


def told(message: str) -> str:
    """A message of the library, in one line of bounded length."""
    line = " ".join(message.split())
    return f"cannot be compiled: {line[:MAX_SHOWN]}{'...' if len(line) > MAX_SHOWN else ''}"
