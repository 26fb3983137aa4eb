"""Who is there: services that said so recently. Soft state on a given clock, without Ray."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

VERIFIER, DRAFTER = "verifier", "drafter"


@dataclass(frozen=True)
class Member:
    """One service replica. address: "host:port" of its engine port (verifier) or link port (drafter).

    info: small facts for the others, e.g. {"drafter": id} of a verifier that is linked.
    """

    kind: str
    id: str
    address: str
    info: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """All members, ordered by id. `version` differs whenever the members or their facts differ."""

    version: str
    members: tuple[Member, ...]

    def of(self, kind: str) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.kind == kind)


EMPTY_VIEW = View("", ())


class Membership:
    """Members by id, each with a time to live in seconds that a new registration extends."""

    def __init__(self) -> None:
        self._life = secrets.token_hex(4)  # a restarted directory must not look unchanged to those who watch it
        self._changes = 0
        self._members: dict[str, tuple[Member, float]] = {}

    @property
    def view(self) -> View:
        members = sorted((member for member, _ in self._members.values()), key=lambda member: member.id)
        return View(f"{self._life}.{self._changes}", tuple(members))

    def register(self, member: Member, ttl_s: float, now: float) -> bool:
        """Add or refresh. True if the view changed (a mere refresh changes nothing)."""
        known = self._members.get(member.id)
        self._members[member.id] = (member, now + ttl_s)
        return self._changed(known is None or known[0] != member)

    def unregister(self, member_id: str) -> bool:
        return self._changed(self._members.pop(member_id, None) is not None)

    def expire(self, now: float) -> bool:
        """Drop members whose time is over."""
        over = [member_id for member_id, (_, until) in self._members.items() if until <= now]
        for member_id in over:
            del self._members[member_id]
        return self._changed(bool(over))

    def next_expiry(self) -> float | None:
        """When the next member's time is over, if nothing refreshes it."""
        return min((until for _, until in self._members.values()), default=None)

    def _changed(self, changed: bool) -> bool:
        self._changes += changed
        return changed
