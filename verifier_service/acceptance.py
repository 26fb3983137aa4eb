"""Lossless acceptance, on plain integers: what the target itself says decides; drafts only let it say more at once.

The target samples every position of a verified block itself, with random numbers that do not depend on the drafts.
A draft token stands while it equals that sample; the sample after the last one standing is the new bonus token. So
the text is the target's own, token by token, whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def accepted_drafts(row: Sequence[int], samples: Sequence[int], first: int = 0) -> int:
    """How many drafts stand. row: bonus token and drafts; samples[first + i]: the target's token after row[i]."""
    count = 0
    for draft in row[1:]:
        if draft != samples[first + count]:
            break
        count += 1
    return count


def still_to_come(drafts: tuple[int, ...], tokens: Sequence[int]) -> tuple[int, ...]:
    """What is left of drafts after their first were committed otherwise; nothing if the tokens differ from them."""
    count = len(tokens)
    return drafts[count:] if drafts[:count] == tuple(tokens) else ()


def cut(
    tokens: Sequence[int], generated: int, stop_token_ids: Collection[int], min_new_tokens: int, max_new_tokens: int
) -> tuple[int, str | None]:
    """How many of the new `tokens` are output, and why it ends there: "stop", "length" or None.

    generated: output tokens before these. A stop token is part of the output; it stops once min_new_tokens others came
    before it (where it would come earlier, its logit is masked).
    """
    count = min(len(tokens), max_new_tokens - generated)
    if stop_token_ids:
        for index in range(max(0, min_new_tokens - generated), count):
            if tokens[index] in stop_token_ids:
                return index + 1, "stop"
    return count, "length" if generated + count >= max_new_tokens else None
