"""From a grammar's text to a matcher over the target's tokens."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

from cluster.contracts import EngineRequest, GrammarSpec
from cluster.errors import ConfigError
from cluster.grammar import LIMITS, GrammarError, source, told
from cluster.tokenizer_files import end_ids, load_tokenizer
from verifier_service.grammar.constraint import Constraint

KEPT = 32  # compiled grammars, for the next request that has the same


class GrammarCompiler:
    """One target's. compile may be called from several threads.

    tokenizer: text of tokenizer.json. vocabulary: of the target's logits. ends: tokens that may come where a grammar
    allows the output to end, and nowhere else. Raises ConfigError for a tokenizer that the library cannot take.
    """

    def __init__(self, tokenizer: str, vocabulary: int, ends: frozenset[int]):
        try:
            self._tokenizer = LLTokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(ends) or None)
        except Exception as error:  # the library raises whatever it is made of
            raise ConfigError(f"grammars are not possible with this tokenizer.json: {error}") from error
        self.vocabulary = vocabulary
        self._lock = threading.Lock()
        self._compiled: OrderedDict[GrammarSpec, LLMatcher] = OrderedDict()

    @classmethod
    def load(cls, directory: str | Path, vocabulary: int) -> GrammarCompiler:
        """directory: of the target's checkpoint. Raises ConfigError."""
        tokenizer = load_tokenizer(Path(directory))
        ends = frozenset(token for token in end_ids(Path(directory), tokenizer) if token < vocabulary)
        return cls(tokenizer.to_str(), vocabulary, ends)

    def compile(self, request: EngineRequest) -> Constraint:
        """At the request's state: after what it has generated. Up to a second, without the interpreter's lock.

        Raises GrammarError, which names the field.
        """
        assert request.grammar is not None
        try:
            matcher = self._matcher(request.grammar)
        except GrammarError as error:
            raise GrammarError(f"grammar.text {error}") from error
        except BaseException as error:  # a panic of the library is no Exception, and must end this request only
            raise GrammarError(f"grammar.text {told(repr(error))}") from error
        constraint = Constraint(matcher, frozenset(self._tokenizer.eos_tokens) | request.stop_token_ids)
        kept = constraint.take(request.generated_ids)
        if kept < len(request.generated_ids):
            raise GrammarError(f"generated_ids[{kept}] is {request.generated_ids[kept]}, which the grammar forbids")
        return constraint

    def _matcher(self, spec: GrammarSpec) -> LLMatcher:
        with self._lock:
            if (compiled := self._compiled.get(spec)) is not None:
                self._compiled.move_to_end(spec)
                return compiled.deep_copy()
        matcher = LLMatcher(self._tokenizer, source(spec), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(told(matcher.get_error()))
        with self._lock:
            self._compiled[spec] = matcher
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()
