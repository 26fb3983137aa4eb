"""Which engine takes a prompt: rendezvous hashing with bounded loads. Pure policy.

Prompts that begin alike go to one engine, whose prefix cache then holds their beginning, unless that engine carries
more than its share; then to the next in the prompt's own order. An engine that comes or goes moves only its own share
of prompts (rendezvous hashing, Thaler and Ravishankar 1998; bounded loads, Mirrokni et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

BLOCK_TOKENS = 16
KEY_BLOCKS = 4
SLACK = 1.25


@dataclass(frozen=True)
class Load:
    """An engine as the choice sees it. in_flight: choices it holds now; capacity: how many it runs at once."""

    engine_id: str
    in_flight: int
    capacity: int


def prompt_key(prompt_ids: Sequence[int], salt: str) -> bytes:
    """Hash of the prompt's first whole blocks, at most KEY_BLOCKS; of all of a prompt shorter than a block."""
    blocks = min(len(prompt_ids) // BLOCK_TOKENS, KEY_BLOCKS)
    head = prompt_ids[: blocks * BLOCK_TOKENS or BLOCK_TOKENS]
    return blake2b(repr((salt, *head)).encode(), digest_size=16).digest()


def choose(loads: Sequence[Load], key: bytes) -> str:
    """The engine_id for a prompt. `loads` must not be empty.

    The bound of an engine is SLACK times its share, by capacity, of everything in flight with this prompt included;
    rounded up, the bounds hold more than there is, so some engine always has room.
    """
    total = sum(load.in_flight for load in loads) + 1
    capacity = sum(load.capacity for load in loads)
    ranked = sorted(loads, key=lambda load: _weight(load.engine_id, key), reverse=True)
    for load in ranked:
        if load.in_flight < math.ceil(SLACK * total * load.capacity / capacity):
            return load.engine_id
    return min(ranked, key=lambda load: load.in_flight / load.capacity).engine_id


def _weight(engine_id: str, key: bytes) -> bytes:
    return blake2b(engine_id.encode(), key=key, digest_size=8).digest()
