"""Exchange of small tensors between ranks of one host through shared memory.

Between CPU ranks a socket collective costs hundreds of microseconds, nearly all of it waking threads; a decode step
makes two a layer. Here a rank writes its part into memory that all ranks map, and yields until the others have.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

CAPACITY = 1 << 20  # bytes of one part
LINE = 64  # counters are a cache line apart
SPINS = 200  # looks at the counters between two looks at the clock
_NAME_BYTES = 256


class HostExchange:
    """Every rank calls `exchange` the same number of times, with parts of the same shape and dtype.

    Two buffers a rank, used in turn: a rank can overwrite one only after all have begun the next exchange, hence
    have read it. The file has no name once all ranks have mapped it, so nothing is left behind by a kill.
    """

    def __init__(self, memory: mmap.mmap, rank: int, size: int, timeout_s: float):
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._turn = 0
        self._turns = memoryview(memory).cast("B")[: size * LINE].cast("q")
        self._others = [other * LINE // 8 for other in range(size) if other != rank]
        whole = torch.frombuffer(memory, dtype=torch.uint8, offset=size * LINE)
        self._parts = whole.view(2, size, CAPACITY)
        self._fence = threading.Lock()
        self._fence.acquire()

    def fits(self, part: torch.Tensor) -> bool:
        """Whether a part can go this way; the same answer on every rank."""
        return part.nbytes <= CAPACITY

    def exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        """Parts of all ranks in rank order, flat; views that hold until this rank's next exchange.

        Raises TimeoutError if a rank does not come within the group's timeout.
        """
        self._turn += 1
        parts = self._parts[self._turn & 1, :, : part.nbytes].view(part.dtype)
        parts[self._rank].copy_(part.reshape(-1))
        self._barrier()  # the part is visible before the turn that announces it
        self._turns[self._rank * LINE // 8] = self._turn
        self._wait()
        return list(parts.unbind())

    def _wait(self) -> None:
        turns, turn = self._turns, self._turn
        deadline = 0.0
        for other in self._others:
            while turns[other] < turn:
                for _ in range(SPINS):
                    os.sched_yield()
                    if turns[other] >= turn:
                        break
                else:
                    now = time.monotonic()
                    deadline = deadline or now + self._timeout_s
                    if now > deadline:
                        raise TimeoutError(
                            f"rank {other * 8 // LINE} of the target did not join exchange {turn} within "
                            f"{self._timeout_s:.0f} s: it is dead or stalled"
                        )
        self._barrier()  # the parts are read after the turns

    def _barrier(self) -> None:
        """No memory access moves across, on weakly ordered machines either.

        A release and then an acquire: the other way round both sides could still meet in between.
        """
        self._fence.release()
        self._fence.acquire()


def open_host_exchange(rank: int, size: int, group: dist.ProcessGroup, timeout_s: float = 60.0) -> HostExchange | None:
    """Collective. None on every rank if they do not share a host's memory, or it is too small."""
    name = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
    path: Path | None = None
    memory: mmap.mmap | None = None
    length = size * LINE + 2 * size * CAPACITY
    try:
        if rank == 0:
            path = _create(length)
            if path is not None:
                encoded = os.fsencode(path)
                name[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        dist.broadcast(name, group=group, group_src=0)
        memory = _map(bytes(name.tolist()).rstrip(b"\0"), length)
        everyone = torch.tensor(int(memory is not None))
        dist.all_reduce(everyone, op=dist.ReduceOp.MIN, group=group)
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    return HostExchange(memory, rank, size, timeout_s) if memory is not None and everyone.item() else None


def _create(length: int) -> Path | None:
    """A new file of memory, its pages reserved: running out later would kill the process."""
    directory = Path("/dev/shm")
    if not directory.is_dir():
        return None
    try:
        handle, name = tempfile.mkstemp(prefix="paceline-", dir=directory)
    except OSError:
        return None
    try:
        if len(os.fsencode(name)) >= _NAME_BYTES:
            raise OSError(f"{name} is too long a name to tell the other ranks")
        os.posix_fallocate(handle, 0, length)
    except OSError:
        os.unlink(name)
        return None
    finally:
        os.close(handle)
    return Path(name)


def _map(name: bytes, length: int) -> mmap.mmap | None:
    try:
        handle = os.open(name, os.O_RDWR)
    except (OSError, ValueError):
        return None
    try:
        return mmap.mmap(handle, length)
    except (OSError, ValueError):
        return None
    finally:
        os.close(handle)
