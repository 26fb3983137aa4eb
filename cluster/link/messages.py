"""Control frames of the link between a verifier and a drafter (protocol 4): one layout, used by both ends.

All positions are absolute token positions (0 = first prompt token). context_id = "verifier_id/request_id/choice".
Tensor rows announced by an Append follow on the tensor plane, in the order of the Appends. What a step says of many
contexts travels in one frame; its parts are arrays without field names, and nothing for the garbage collector to trace.
"""

from __future__ import annotations

import msgspec

PROTOCOL = 4
MAX_ENTRIES = 512  # contexts of one frame, at most: with the longest ids, a control frame holds so many


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


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Positions start .. start+count-1 of a context."""

    context_id: str
    start: int
    count: int


class Append(msgspec.Struct, frozen=True, tag="append"):
    """Context features of these pieces, whose rows follow one after the other. At most MAX_ENTRIES of them.

    Idempotent for each context: positions that are known already are skipped.
    """

    pieces: tuple[Piece, ...]


class Share(msgspec.Struct, frozen=True, tag="share"):
    """Verifier -> drafter: positions start .. start+count-1 of this new context are those of context `source`, which is
    open or was closed: their tokens are the same from the first on. An Unshared answers it where they are gone.
    """

    context_id: str
    source: str
    start: int
    count: int


class Mark(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Features of a context are held for all positions below `watermark` (within the window)."""

    context_id: str
    watermark: int


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """Drafter -> verifier: of all contexts that moved in one pass."""

    marks: tuple[Mark, ...]


class DraftAsk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Want `rows` draft tokens after position `base`, which holds `bonus_token`. Needs features for [.., base)."""

    context_id: str
    base: int
    bonus_token: int
    rows: int


class Draft(msgspec.Struct, frozen=True, tag="draft"):
    """Verifier -> drafter: one step's asks in one frame."""

    asks: tuple[DraftAsk, ...]


class DraftAnswer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """token_ids may be empty ("no drafts"). confidence[i] = P(token i right | all before it in the block right)."""

    context_id: str
    base: int
    token_ids: tuple[int, ...]
    confidence: tuple[float, ...]


class Drafted(msgspec.Struct, frozen=True, tag="drafted"):
    """Drafter -> verifier: answers, as many as were computed together."""

    answers: tuple[DraftAnswer, ...]


class Close(msgspec.Struct, frozen=True, tag="close"):
    """Verifier -> drafter: these contexts are done. Others may share what they hold, until its room is needed."""

    context_ids: tuple[str, ...]


class Evicted(msgspec.Struct, frozen=True, tag="evicted"):
    """Drafter -> verifier: this context was dropped for want of room; append again to draft for it."""

    context_id: str


class Unshared(msgspec.Struct, frozen=True, tag="unshared"):
    """Drafter -> verifier: what this context was to share is not held any more; append it."""

    context_id: str


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    """Drafter -> verifier: `bytes` more may be sent on the tensor plane."""

    bytes: int


class DraftTotals(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a drafter has done since its start, for all its links together: cluster.api.engine_metrics says what each
    number is. New ones go to the end."""

    asks: int = 0
    empty: int = 0
    refused: int = 0
    steps: int = 0
    drafts: int = 0
    rows: int = 0
    padding_rows: int = 0
    eager_steps: int = 0
    graphs: int = 0
    graph_failures: int = 0
    appended_rows: int = 0
    shared_rows: int = 0
    evicted: int = 0
    turned_away: int = 0
    busy_seconds: float = 0.0


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Both ways, every heartbeat period. queue: asks waiting; utilisation 0..1; seconds: p50 of a draft batch; totals:
    of a drafter, None from a verifier."""

    queue: int = 0
    utilisation: float = 0.0
    seconds: float = 0.0
    totals: DraftTotals | None = None


FromVerifier = Hello | Append | Share | Draft | Close | Heartbeat
FromDrafter = Welcome | Refused | Ack | Drafted | Evicted | Unshared | Credit | Heartbeat
