"""Which bits each token's row was computed with, over many schedules: in deterministic mode, always the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from tests.verifier_service.families.ranks import Outcome
from tests.verifier_service.families.schedule import Texts, asks

Context = tuple[int, ...]  # all tokens that a row has seen
Bits = Mapping[Context, frozenset[bytes]]


def bits_of(texts: Texts, seed: int, outcome: Outcome) -> Bits:
    """By what a row has seen: digests of its logits and taps, from all requests of one schedule."""
    found: dict[Context, set[bytes]] = {}
    for ask in asks(texts, seed):
        prompt, output = texts[ask.text][0], outcome.outputs.get(ask.name, [])
        for index in range(len(output)):
            row = outcome.rows[ask.name, index]
            digest = hashlib.blake2b(row.logits.numpy().tobytes() + row.taps.numpy().tobytes(), digest_size=16)
            found.setdefault((*prompt, *output[:index]), set()).add(digest.digest())
    return _frozen(found)


def merged(schedules: Iterable[Bits]) -> Bits:
    found: dict[Context, set[bytes]] = {}
    for bits in schedules:
        for context, digests in bits.items():
            found.setdefault(context, set()).update(digests)
    return _frozen(found)


def unsettled(bits: Bits) -> int:
    """Contexts whose rows were not always the same bits."""
    return sum(len(digests) > 1 for digests in bits.values())


def _frozen(found: Mapping[Context, set[bytes]]) -> Bits:
    return {context: frozenset(digests) for context, digests in found.items()}
