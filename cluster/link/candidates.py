"""Which drafter to dial next, and after how long: pure policy, no sockets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_DELAY_S = 0.05
LAST_DELAY_S = 1.0
BARRED_DELAY_S = 30.0
_MAX_FAILURES = 6  # 0.05 s doubled five times passes the last delay; beyond it counting on would only bury a candidate


@dataclass
class _Record:
    failures: int = 0
    tried: int = 0
    barred: bool = False


class Candidates:
    """Addresses, best first. The one with the fewest failures in a row is next; among equals the least recently tried.

    So a drafter that just failed comes after every other, and two that both fail take turns.
    """

    def __init__(self, seed: int | None = None):
        self._records: dict[str, _Record] = {}
        self._random = random.Random(seed)
        self._turn = 0

    def replace(self, addresses: Sequence[str]) -> None:
        """New list; what is known of addresses that stay is kept."""
        self._records = {address: self._records.get(address) or _Record() for address in addresses}

    def __contains__(self, address: str) -> bool:
        return address in self._records

    def next(self) -> tuple[str, float] | None:
        """(address, seconds to wait before dialling it); None while there are no candidates."""
        if not self._records:
            return None
        address, record = min(self._records.items(), key=lambda item: (item[1].failures, item[1].tried))
        if all(each.barred for each in self._records.values()):
            return address, BARRED_DELAY_S
        return address, self._delay(record.failures)

    def failed(self, address: str, barred: bool = False) -> None:
        """Refused, unreachable, or its link broke. barred: until a person acts; where all are, there is no hurry."""
        self._turn += 1
        if record := self._records.get(address):
            record.barred = barred
            record.failures = min(record.failures + 1, _MAX_FAILURES)
            record.tried = self._turn

    def proved(self, address: str) -> None:
        """A link to it stood for a while: earlier failures are forgiven."""
        if record := self._records.get(address):
            record.failures, record.barred = 0, False

    def _delay(self, failures: int) -> float:
        if failures == 0:
            return 0.0
        delay = min(FIRST_DELAY_S * 2 ** (failures - 1), LAST_DELAY_S)
        return delay * self._random.uniform(0.5, 1.0)
