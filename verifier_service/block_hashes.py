"""Names of full KV blocks: equal for equal tokens after equal tokens of the same tenant, different otherwise.

A block's hash covers its parent's hash and its own tokens, and the first parent is the hash of the salt. So one lookup
of a block answers for everything before it, and no prompt of one tenant can name a block of another's. The hash is a
cryptographic one: text that collides with another request's cannot be made on purpose.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

BlockHash = bytes

HASH_BYTES = 16


def root_of(salt: str) -> BlockHash:
    """The parent of a first block."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES, person=b"salt").digest()


def extend(hashes: list[BlockHash], salt: str, tokens: Sequence[int], block_tokens: int, count: int) -> None:
    """Append what is missing of the hashes of the first `count` blocks of `tokens`, all of them full."""
    if len(hashes) >= count:
        return
    parent = hashes[-1] if hashes else root_of(salt)
    for first in range(len(hashes) * block_tokens, count * block_tokens, block_tokens):
        own = array("q", tokens[first : first + block_tokens]).tobytes()
        parent = blake2b(parent + own, digest_size=HASH_BYTES).digest()
        hashes.append(parent)
