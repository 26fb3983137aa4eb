"""One of two ranks, of which the second has no room, while the first waits for it in a collective:
`python -m tests.verifier_service.failing_rank RANK PORT`.

Like an actor, the second stays alive after its failure, until its standard input is closed.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from verifier_service.model.memory_room import NoRoomError
from verifier_service.rank_group import joined_ranks


def main() -> None:
    rank, port = int(sys.argv[1]), sys.argv[2]
    try:
        with joined_ranks(2, "cpu", rank, f"127.0.0.1:{port}") as ranks:
            if rank == 1:
                raise NoRoomError("kv_cache_tokens is 'auto', but nothing is left")
            dist.all_reduce(torch.ones(1), group=ranks.group)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
