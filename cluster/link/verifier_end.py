"""The verifier's end of a link: one drafter at a time, found and found again in the background.

The engine's thread records, queues and waits on a condition; it never waits for the network. One thread dials and
reads, the pump's thread beats and writes what the kernel had no room for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

import torch

from cluster.errors import ConfigError, PacelineError, ProtocolError, SecretError
from cluster.link.answers import AnswerBook
from cluster.link.candidates import Candidates
from cluster.link.connection import MAX_CONTROL_BYTES
from cluster.link.face import LinkState
from cluster.link.messages import (
    MAX_ENTRIES,
    PROTOCOL,
    Ack,
    Close,
    Credit,
    Draft,
    DraftAnswer,
    DraftAsk,
    Drafted,
    Evicted,
    FromDrafter,
    Heartbeat,
    Hello,
    Piece,
    Share,
    Unshared,
)
from cluster.link.planes import DTYPES, MAX_ROWS_BYTES, appends, row_bytes
from cluster.link.pump import Pump
from cluster.link.session import Dialler, RefusedError, Session
from cluster.link.torch_plane import why_unavailable
from cluster.tls import TlsFiles, dialler_context
from cluster.wire import Codec

log = logging.getLogger(__name__)


class RemoteLink:
    """A VerifierLink over TCP. All times in seconds.

    token: the secret that both ends have to know. hidden, dtype: width and wire dtype ("float32", "bfloat16",
    "float16") of a context feature. tensor_transport: "tcp" or "torch" (gloo on CPU, NCCL on CUDA). max_queued_bytes:
    bound of what waits for a slow drafter; over it the epoch ends. Raises ConfigError for settings that cannot work;
    afterwards nothing raises because of the peer.
    """

    def __init__(
        self,
        *,
        verifier_id: str,
        target_fingerprint: str,
        feature_version: str,
        hidden: int,
        vocabulary: int,
        token: str,
        tls: TlsFiles | None = None,
        dtype: str = "float32",
        tensor_transport: str = "tcp",
        heartbeat_s: float = 0.5,
        hard_deadline_s: float = 3.0,
        device: str = "cpu",
        max_queued_bytes: int = 256 << 20,
    ):
        if dtype not in DTYPES:
            raise ConfigError(f"link.dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
        if tensor_transport not in ("tcp", "torch"):
            raise ConfigError(f"link.tensor_transport is {tensor_transport!r}: choose 'tcp' or 'torch'")
        if tensor_transport == "torch" and (reason := why_unavailable(device)):
            raise ConfigError(f"link.tensor_transport is 'torch', but {reason}: choose 'tcp'")
        self._hello = Hello(
            protocol=PROTOCOL,
            verifier_id=verifier_id,
            epoch=0,
            target_fingerprint=target_fingerprint,
            feature_version=feature_version,
            hidden=hidden,
            vocabulary=vocabulary,
            dtype=dtype,
            tensor_transport=tensor_transport,
        )
        self._rows_per_append = max(1, MAX_ROWS_BYTES // row_bytes(hidden, DTYPES[dtype]))
        self._hard_deadline = hard_deadline_s
        self._codec: Codec[FromDrafter] = Codec(FromDrafter, MAX_CONTROL_BYTES)
        self._book = AnswerBook(vocabulary)
        self._counters: Counter[str] = Counter(
            epochs_ended=0, dial_failures=0, refused=0, queue_overflows=0, protocol_errors=0, acks=0
        )
        self._changed = threading.Condition(threading.Lock())
        self._candidates = Candidates()
        self._complaints: set[tuple[str, str]] = set()
        self._latest: Session | None = None
        self._stopping = False
        self._drafter_load = Heartbeat()
        heartbeat = self._codec.pack(Heartbeat())
        self._pump = Pump("link-pump", heartbeat_s, hard_deadline_s, lambda: heartbeat)
        self._dialler = Dialler(
            self._hello,
            token,
            dialler_context(tls),
            self._codec,
            hard_deadline_s,
            device,
            max_queued_bytes,
            self._pump.wake,
        )
        self._thread = threading.Thread(target=self._run, name="link-reader", daemon=True)
        self._thread.start()

    # The engine's calls.

    @property
    def state(self) -> LinkState:
        session = self._latest
        if session is None:
            return LinkState(linked=False, epoch=0)
        return LinkState(
            linked=session.live,
            epoch=session.epoch,
            drafter_id=session.welcome.drafter_id,
            drafter_version=session.welcome.drafter_version,
            block_size=session.welcome.block_size,
            window=session.welcome.window,
            sent_bytes=session.sent_bytes,
            capacity_contexts=session.welcome.capacity_contexts,
        )

    @property
    def counters(self) -> dict[str, int]:
        """Answers taken and dropped, epochs ended and why: see AnswerBook for the answers'."""
        return {**self._counters, **self._book.counters}

    @property
    def drafter_load(self) -> Heartbeat:
        return self._drafter_load

    @property
    def queued_bytes(self) -> int:
        """What waits for the drafter to read it: the measure by which re-appends after a new epoch are rationed."""
        session = self._live()
        return session.connection.queued_bytes + session.plane.queued_bytes if session else 0

    def append(self, pieces: Sequence[Piece], features: torch.Tensor) -> None:
        """Send context features [rows, hidden], piece after piece. They leave with the next ask, heartbeat or 64 KiB.

        The caller's memory is free for reuse on return. Raises ValueError for rows of another width.
        """
        session = self._live()
        if session is None:
            return
        if features.shape[1] != self._hello.hidden:
            raise ValueError(f"features are {features.shape[1]} wide, this link carries rows of {self._hello.hidden}")
        first = 0
        for append in appends(pieces, self._rows_per_append):
            count = sum(piece.count for piece in append.pieces)
            session.plane.send(append, features[first : first + count])
            first += count

    def share(self, share: Share) -> None:
        session = self._live()
        if session is not None:
            session.connection.send(self._codec.pack(share), hold=True)

    def ask(self, asks: Sequence[DraftAsk]) -> None:
        session = self._live()
        self._book.asked(asks, session.epoch if session else 0)
        if session is not None:
            for first in range(0, len(asks), MAX_ENTRIES):
                session.connection.send(self._codec.pack(Draft(tuple(asks[first : first + MAX_ENTRIES]))))

    def collect(self, asks: Sequence[DraftAsk], timeout_s: float) -> list[DraftAnswer]:
        return self._book.collect(asks, timeout_s)

    def close_contexts(self, context_ids: Sequence[str]) -> None:
        self._book.close(context_ids)
        session = self._live()
        if session is not None:
            for first in range(0, len(context_ids), MAX_ENTRIES):
                session.connection.send(self._codec.pack(Close(tuple(context_ids[first : first + MAX_ENTRIES]))))

    def evicted(self) -> list[str]:
        return self._book.take_evicted()

    def unshared(self) -> list[str]:
        return self._book.take_unshared()

    def set_drafters(self, addresses: Sequence[str]) -> None:
        with self._changed:
            self._candidates.replace(addresses)
            session = self._live()
            self._changed.notify_all()
        if session is not None and session.address not in addresses:
            session.connection.close("its address is no longer among the candidates")

    def stop(self) -> None:
        """End the epoch and both threads. Takes at most about the hard deadline, usually milliseconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            session = self._live()
        self._dialler.stop()
        if session is not None:
            session.connection.close("this end stops")
        self._thread.join(self._hard_deadline + 1)
        self._pump.stop()

    def _live(self) -> Session | None:
        session = self._latest
        return session if session is not None and session.live else None

    # The reading thread.

    def _run(self) -> None:
        while (address := self._next_address()) is not None:
            try:
                session = self._dialler.dial(address, self._latest)
            except Exception as error:
                self._failed(address, error)
            else:
                self._serve(session)

    def _next_address(self) -> str | None:
        """Waits for a candidate and its back-off; None when stopping."""
        started = time.monotonic()
        with self._changed:
            choice = self._candidates.next()
            while not self._stopping:
                left = None if choice is None else started + choice[1] - time.monotonic()
                if choice is not None and left is not None and left <= 0:
                    return choice[0]
                if self._changed.wait(left):
                    choice = self._candidates.next()
        return None

    def _serve(self, session: Session) -> None:
        began = time.monotonic()
        self._begin(session)
        try:
            while True:
                self._take(session, session.connection.receive())
        except Exception as error:  # whatever it was, it ended this epoch and not the link
            if not isinstance(error, (OSError, PacelineError)):
                log.exception("reading from the drafter at %s failed", session.address)
            self._counters["protocol_errors"] += isinstance(error, ProtocolError)
            self._end(session, error, time.monotonic() - began)

    def _begin(self, session: Session) -> None:
        self._book.begin(session.epoch)
        with self._changed:
            self._latest = session
            unwanted = self._stopping or session.address not in self._candidates
            self._complaints.clear()
        self._pump.watch(session.connection)
        if unwanted:
            session.connection.close("its address is no longer among the candidates")
        log.info("linked to drafter %s at %s, epoch %d", session.welcome.drafter_id, session.address, session.epoch)

    def _take(self, session: Session, message: FromDrafter) -> None:
        match message:
            case Drafted():
                self._book.deliver(message.answers)
            case Ack():
                self._counters["acks"] += 1
            case Heartbeat():
                self._drafter_load = message
            case Credit():
                session.plane.granted(message.bytes)
            case Evicted():
                self._book.evict(message.context_id)
            case Unshared():
                self._book.unshare(message.context_id)
            case _:
                raise ProtocolError(f"a {type(message).__name__} in the middle of an epoch")

    def _end(self, session: Session, error: Exception, lasted: float) -> None:
        reason = session.connection.reason or str(error)
        with self._changed:
            session.live = False
            self._counters["epochs_ended"] += 1
            self._counters["queue_overflows"] += session.connection.overflowed
            if lasted > self._hard_deadline:
                self._candidates.proved(session.address)
            self._candidates.failed(session.address)
            stopping = self._stopping
        self._book.end()
        self._pump.forget(session.connection)
        session.connection.release()
        session.plane.close()
        if not stopping:
            log.warning("epoch %d with the drafter at %s ended: %s", session.epoch, session.address, reason)

    def _failed(self, address: str, error: Exception) -> None:
        with self._changed:
            self._candidates.failed(address, barred=isinstance(error, SecretError))
            self._counters["dial_failures"] += 1
            self._counters["refused"] += isinstance(error, RefusedError | SecretError)
            complaint = (address, str(error))
            known = complaint in self._complaints or self._stopping
            if len(self._complaints) < 1000:
                self._complaints.add(complaint)
        if not isinstance(error, (OSError, PacelineError)):
            log.error("dialling the drafter at %s failed", address, exc_info=error)
        elif not known:
            log.warning("no link to the drafter at %s: %s; trying again", address, error)
