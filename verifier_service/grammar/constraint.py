"""Where one request stands in its grammar."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher

from cluster.grammar import told


class Constraint:
    """Owned by one request. ends: tokens that may end its output: the target's own and the request's."""

    def __init__(self, matcher: LLMatcher, ends: frozenset[int]):
        self.matcher = matcher
        self.ends = ends

    @property
    def complete(self) -> bool:
        """Nothing can follow."""
        return self.matcher.is_stopped()

    @property
    def problem(self) -> str | None:
        """Why the grammar cannot go on, for a person: it has grown beyond its limits, or was disobeyed."""
        return f"grammar.text {told(self.matcher.get_error())}" if self.matcher.is_error() else None

    def allowed(self, drafts: Sequence[int]) -> int:
        """How many of the drafts may follow each other from here."""
        return self.matcher.validate_tokens(list(drafts))

    def take(self, tokens: Sequence[int]) -> int:
        """Follow the output. How many of the tokens belong to it: all, or those up to where nothing can follow."""
        for count, token in enumerate(tokens):
            if self.complete or not self.matcher.consume_token(token):
                return count
        return len(tokens)
