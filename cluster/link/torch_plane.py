"""The torch.distributed tensor plane: a two-rank process group of its own for every epoch, gloo on CPU, NCCL on CUDA.

NCCL is not a socket: a send whose peer has stalled is a kernel that spins beside the target's all-reduce. So a send is
launched only after the peer granted Credit for it, and the peer grants credit only once its receive is posted. The
receiver takes all Appends that have already arrived in one transfer; the credit's size tells the sender how many.
"""

from __future__ import annotations

import hmac
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from cluster.errors import LinkError, ProtocolError
from cluster.link.connection import Connection
from cluster.link.messages import Append, FromDrafter, FromVerifier, Hello
from cluster.link.planes import DTYPES, MAX_ROWS_BYTES, check_append, row_bytes
from cluster.link.side_stream import SideStream
from cluster.wire import Codec

_VERIFIER, _DRAFTER = 0, 1


def why_unavailable(device: str) -> str | None:
    """Why this process cannot have a torch plane on `device`; None if it can."""
    if torch.device(device).type != "cuda":
        return None if dist.is_available() and dist.is_gloo_available() else "this torch has no gloo"
    if not (torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available()):
        return f"device is {device!r}, but there is no CUDA device with NCCL here"
    return None


class TorchMeeting:
    """Where both ends of one epoch meet to build their process group: a TCPStore that the verifier hosts.

    key: of the handshake. The store's keys are prefixed with it: who finds the port does not find them.
    """

    def __init__(self, store: Any, hello: Hello, key: bytes, host: str, timeout_s: float, device: str):
        self.hello = hello
        self._store = store
        self._key = key
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)
        self._device = torch.device(device)

    @classmethod
    def host(cls, host: str, hello: Hello, key: bytes, timeout_s: float, device: str) -> TorchMeeting:
        """The verifier's side, before its Hello, which gains the store's port. host: its own address to the peer."""
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listener.getsockname()[1]
        with _as_link_error("hosting the store"):
            store = dist.TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_s),
                master_listen_fd=listener.detach(),
            )
        return cls(store, msgspec.structs.replace(hello, store_port=port), key, host, timeout_s, device)

    @classmethod
    def join(cls, peer_host: str, host: str, hello: Hello, key: bytes, timeout_s: float, device: str) -> TorchMeeting:
        """The drafter's side, after its Welcome."""
        with _as_link_error(f"reaching the store at {peer_host}:{hello.store_port}"):
            store = dist.TCPStore(
                peer_host,
                hello.store_port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_s),
            )
        return cls(store, hello, key, host, timeout_s, device)

    def sender(self, connection: Connection[FromDrafter], codec: Codec[FromDrafter], max_queued: int) -> TorchSender:
        """Blocks until the drafter has joined, at most the timeout. Raises LinkError."""
        return TorchSender(self._group(_VERIFIER), connection, codec, DTYPES[self.hello.dtype], max_queued)

    def receiver(self, connection: Connection[FromVerifier], grant: Callable[[int], None]) -> TorchReceiver:
        """Blocks until the verifier has joined, at most the timeout. Raises LinkError."""
        return TorchReceiver(self._group(_DRAFTER), connection, grant, self.hello)

    def _group(self, rank: int) -> _Group:
        pair = hmac.digest(self._key, b"torch plane", "sha256").hex()
        store = dist.PrefixStore(f"{pair}/{self.hello.epoch}", self._store)
        with _as_link_error("building the process group"):
            if self._device.type == "cuda":
                group = _Group(_nccl(store, rank, self._timeout, self._device), self._device, self._timeout)
            else:
                group = _Group(_gloo(store, rank, self._timeout, self._host), self._device, self._timeout)
            self._shake_hands(group, rank)
        return group

    def _shake_hands(self, group: _Group, rank: int) -> None:
        """One row before the first Append. NCCL makes its communicator in the first transfer and blocks until the peer
        comes; later the receiver comes first and alone, because credit follows the posted receive."""
        row = torch.zeros(1, device=self._device)
        if rank == _VERIFIER:
            group.finish(group.group.send([row], _DRAFTER, 0))
        else:
            group.finish(group.group.recv([row], _VERIFIER, 0))


def _gloo(store: Any, rank: int, timeout: timedelta, host: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    # The address of the control connection: the host's own name may resolve to one that the peer cannot reach.
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timeout
    return gloo(store, rank, 2, options)


def _nccl(store: Any, rank: int, timeout: timedelta, device: torch.device) -> Any:
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.max_ctas = 2  # few channels: rows are small, and the target's kernels need the SMs
    with _without_process_kill():
        return dist.ProcessGroupNCCL(store, rank, 2, options)


@contextmanager
def _without_process_kill() -> Iterator[None]:
    """By default a process group that times out takes its process along. Read when a group is made, so only then set:
    the target's own groups, whose failure must end the rank, keep the default."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@dataclass
class _Group:
    """A process group and how to wait for its works with a deadline. `group` is None once closed."""

    group: Any
    device: torch.device
    timeout: timedelta

    def finish(self, work: Any) -> None:
        """Block until the transfer is over. Raises ConnectionError if it fails or takes longer than the timeout."""
        try:
            if self.device.type != "cuda":
                work.wait()
                return
            deadline = time.monotonic() + self.timeout.total_seconds()
            while not work.is_completed():  # NCCL offers no wait with a deadline that leaves the process alive
                if time.monotonic() > deadline:
                    raise ConnectionError("the transfer took longer than the hard deadline")
                time.sleep(20e-6)
            work.wait()
        except RuntimeError as error:
            raise ConnectionError(f"the tensor plane failed: {error}") from error

    def close(self) -> None:
        """Abort what NCCL has under way, and free the sockets and threads: they go with the last reference."""
        if self.group is not None and self.device.type == "cuda":
            self.group.abort()
        self.group = None


class TorchSender:
    """The verifier's end. Rows wait, in the order of their Appends, for the credit of their transfer."""

    def __init__(
        self,
        group: _Group,
        connection: Connection[FromDrafter],
        codec: Codec[FromDrafter],
        dtype: torch.dtype,
        max_queued: int,
    ):
        self._group = group
        self._connection = connection
        self._codec = codec
        self._dtype = dtype
        self._max_queued = max_queued
        self._lock = threading.Lock()
        self._side = SideStream(group.device)
        self._pending: deque[tuple[torch.Tensor, Any]] = deque()  # rows, the event after which they are valid
        self._flying: tuple[Any, list[torch.Tensor]] | None = None  # and what it reads
        self.queued_bytes = 0
        self.sent_bytes = 0

    def send(self, append: Append, rows: torch.Tensor) -> None:
        # A copy always: the caller may reuse its memory long before the credit comes.
        owned = rows.detach().to(self._group.device, self._dtype, copy=True).contiguous()
        ready = None
        if owned.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(owned.device))
        with self._lock:
            self._pending.append((owned, ready))
            self.queued_bytes += owned.nbytes
            waiting = self.queued_bytes
        if waiting > self._max_queued:
            self._connection.overflow(waiting)
            return
        self._connection.send(self._codec.pack(append), hold=True)

    def granted(self, size: int) -> None:
        with self._side.here():
            batch = self._take(size)
            if self._flying is not None:
                # Over already: the peer posts one receive at a time, so this credit says that the last one was filled.
                self._group.finish(self._flying[0])
            data = batch[0] if len(batch) == 1 else torch.cat(batch)
            try:
                self._flying = (self._group.group.send([data], _DRAFTER, 0), [data, *batch])
            except RuntimeError as error:
                raise ConnectionError(f"the tensor plane failed: {error}") from error
        self.sent_bytes += size

    def close(self) -> None:
        self._flying = None
        self._group.close()
        with self._lock:
            self._pending.clear()
            self.queued_bytes = 0

    def _take(self, size: int) -> list[torch.Tensor]:
        batch: list[torch.Tensor] = []
        left = size
        with self._lock:
            while left > 0 and self._pending:
                rows, ready = self._pending.popleft()
                if ready is not None:
                    torch.cuda.current_stream(rows.device).wait_event(ready)
                batch.append(rows)
                left -= rows.nbytes
                self.queued_bytes -= rows.nbytes
        if left or not batch:
            raise ProtocolError(f"credit for {size} bytes does not end at the end of an append")
        return batch


class TorchReceiver:
    """The drafter's end. grant(bytes): sends a Credit."""

    def __init__(self, group: _Group, connection: Connection[FromVerifier], grant: Callable[[int], None], hello: Hello):
        self._group = group
        self._connection = connection
        self._grant = grant
        self._hidden = hello.hidden
        self._dtype = DTYPES[hello.dtype]
        self._row_bytes = row_bytes(hello.hidden, self._dtype)
        self._side = SideStream(group.device)

    def receive(self, append: Append) -> Iterator[tuple[Append, torch.Tensor]]:
        appends = [append]
        sizes = [check_append(append, self._row_bytes)]
        while sum(sizes) < MAX_ROWS_BYTES and (following := self._connection.receive_ready()) is not None:
            if not isinstance(following, Append):
                self._connection.unread(following)
                break
            appends.append(following)
            sizes.append(check_append(following, self._row_bytes))
        size = sum(sizes)
        with self._side.here():
            rows = torch.empty(size // self._row_bytes, self._hidden, dtype=self._dtype, device=self._group.device)
            try:
                work = self._group.group.recv([rows], _VERIFIER, 0)
            except RuntimeError as error:
                raise ConnectionError(f"the tensor plane failed: {error}") from error
            self._grant(size)
            self._group.finish(work)
        self._side.hand_over(rows)
        yield from zip(appends, rows.split([each // self._row_bytes for each in sizes]))

    def close(self) -> None:
        self._group.close()


@contextmanager
def _as_link_error(doing: str) -> Iterator[None]:
    """torch.distributed's errors are RuntimeErrors of many kinds; to the link they all mean: no tensor plane."""
    try:
        yield
    except RuntimeError as error:
        raise LinkError(f"{doing} failed: {error}") from error
