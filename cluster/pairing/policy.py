"""Which drafter each verifier should use: balanced, stable, the same answer wherever it is computed.

Pure policy on plain values. Every verifier's front computes it from the directory's view, so that no one has to
coordinate; equal views give equal answers, and views that differ for a moment cost a re-link, never a request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping


def assign(verifiers: Iterable[str], drafters: Iterable[str], linked: Mapping[str, str]) -> dict[str, str]:
    """One drafter id per verifier id; empty if there are no drafters.

    linked: the drafter each verifier uses now, kept unless drafters would differ by two verifiers or more.
    """
    counts = dict.fromkeys(drafters, 0)
    if not counts:
        return {}
    ordered = sorted(set(verifiers))
    chosen = {v: linked[v] for v in ordered if linked.get(v) in counts}
    for drafter in chosen.values():
        counts[drafter] += 1
    for verifier in ordered:
        if verifier not in chosen:
            _move(verifier, _least(counts, verifier), chosen, counts)
    while max(counts.values()) - min(counts.values()) >= 2:
        busiest = max(sorted(counts), key=lambda drafter: counts[drafter])
        verifier = min((v for v in ordered if chosen[v] == busiest), key=lambda v: _affinity(v, busiest))
        _move(verifier, _least(counts, verifier), chosen, counts)
    return chosen


def preference(
    verifier: str, verifiers: Iterable[str], drafters: Iterable[str], linked: Mapping[str, str]
) -> tuple[str, ...]:
    """Drafter ids that `verifier` may use, best first: its assigned one, then the others by load.

    A drafter that it should move away from is left out: a link is only given up when its drafter is not listed.
    """
    present = sorted(set(drafters))
    chosen = assign({*verifiers, verifier}, present, linked)
    if not chosen:
        return ()
    load = dict.fromkeys(present, 0)
    for other, drafter in chosen.items():
        load[drafter] += other != verifier
    first = chosen[verifier]
    rest = [d for d in present if d != first and d != linked.get(verifier)]
    return (first, *sorted(rest, key=lambda drafter: (load[drafter], -_affinity(verifier, drafter))))


def _least(counts: Mapping[str, int], verifier: str) -> str:
    return min(counts, key=lambda drafter: (counts[drafter], -_affinity(verifier, drafter)))


def _move(verifier: str, drafter: str, chosen: dict[str, str], counts: dict[str, int]) -> None:
    if verifier in chosen:
        counts[chosen[verifier]] -= 1
    chosen[verifier] = drafter
    counts[drafter] += 1


def _affinity(verifier: str, drafter: str) -> int:
    """Rendezvous hash: spreads ties evenly and the same way everywhere."""
    return int.from_bytes(hashlib.blake2b(f"{verifier}\0{drafter}".encode(), digest_size=8).digest())
