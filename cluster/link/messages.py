"""Control frames of the link between a verifier and a drafter (protocol 2): one layout, used by both ends.

All positions are absolute token positions (0 = first prompt token). context_id = "verifier_id/request_id/choice".
Tensor rows announced by an Append follow on the tensor plane, in the order of the Appends.
"""

from __future__ import annotations

import msgspec

PROTOCOL = 2


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Verifier -> drafter, first frame of an epoch once both ends know each other (cluster.handshake).

    hidden: width of a context feature. dtype: of the rows. tensor_transport: "tcp" | "torch". store_port: TCPStore of
    the torch plane, 0 for tcp.
    """

    protocol: int
    verifier_id: str
    epoch: int
    target_fingerprint: str
    feature_version: str
    hidden: int
    vocabulary: int
    dtype: str
    tensor_transport: str
    store_port: int = 0


def claim(verifier_id: str, epoch: int) -> str:
    """What a verifier claims in the handshake; its Hello has to say the same."""
    return f"{verifier_id}#{epoch}"


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Drafter -> verifier: accepted. window: context features kept per context, in tokens."""

    drafter_id: str
    drafter_version: str
    block_size: int
    capacity_contexts: int
    window: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Drafter -> verifier: why this hello cannot be served (names the field and both values). The connection closes."""

    reason: str


class Append(msgspec.Struct, frozen=True, tag="append"):
    """Context features for positions start .. start+count-1 of a context. Idempotent: known positions are skipped."""

    context_id: str
    start: int
    count: int


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """Features of a context are held for all positions below `watermark` (within the window)."""

    context_id: str
    watermark: int


class DraftAsk(msgspec.Struct, frozen=True):
    """Want `rows` draft tokens after position `base`, which holds `bonus_token`. Needs features for [.., base)."""

    context_id: str
    base: int
    bonus_token: int
    rows: int


class Draft(msgspec.Struct, frozen=True, tag="draft"):
    """Verifier -> drafter: one step's asks in one frame."""

    asks: tuple[DraftAsk, ...]


class DraftAnswer(msgspec.Struct, frozen=True):
    """token_ids may be empty ("no drafts"). confidence[i] = P(token i right | all before it in the block right)."""

    context_id: str
    base: int
    token_ids: tuple[int, ...]
    confidence: tuple[float, ...]


class Drafted(msgspec.Struct, frozen=True, tag="drafted"):
    """Drafter -> verifier: answers, as many as were computed together."""

    answers: tuple[DraftAnswer, ...]


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Verifier -> drafter: these contexts are done."""

    context_ids: tuple[str, ...]


class Evicted(msgspec.Struct, frozen=True, tag="evicted"):
    """Drafter -> verifier: this context was dropped for want of room; append again to draft for it."""

    context_id: str


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    """Drafter -> verifier: `bytes` more may be sent on the tensor plane."""

    bytes: int


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Both ways, every heartbeat period. queue: asks waiting; utilisation 0..1; seconds: p50 of a draft batch."""

    queue: int = 0
    utilisation: float = 0.0
    seconds: float = 0.0


FromVerifier = Hello | Append | Draft | Close | Heartbeat
FromDrafter = Welcome | Refused | Ack | Drafted | Evicted | Credit | Heartbeat
