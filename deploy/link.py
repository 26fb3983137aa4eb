"""Rank 0's end of the link: to a drafter elsewhere, or to one in this very process.

It lives here because the two services never import each other, and a colocated drafter brings both into one process.
Each function is a verifier_service.rank.MakeLink.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.link.face import VerifierLink
from drafter_service.config import DrafterSettings
from verifier_service.config import VerifierSettings

if TYPE_CHECKING:
    from modeling.dflash import FeatureFuser


def make_link(
    settings: VerifierSettings,
    fuser: FeatureFuser,
    *,
    verifier_id: str,
    target_fingerprint: str,
    vocabulary: int,
) -> VerifierLink:
    """What settings.speculation.mode asks for. Raises as the chosen one does."""
    make = colocated_link if settings.speculation.mode == "colocated" else remote_link
    return make(settings, fuser, verifier_id=verifier_id, target_fingerprint=target_fingerprint, vocabulary=vocabulary)


def remote_link(
    settings: VerifierSettings,
    fuser: FeatureFuser,
    *,
    verifier_id: str,
    target_fingerprint: str,
    vocabulary: int,
) -> VerifierLink:
    """Links to whichever drafters it is told of. Raises ConfigError for link settings that cannot work."""
    from cluster.link.verifier_end import RemoteLink

    link = settings.link
    return RemoteLink(
        verifier_id=verifier_id,
        target_fingerprint=target_fingerprint,
        feature_version=fuser.feature_version,
        hidden=fuser.hidden,
        vocabulary=vocabulary,
        token=link.token,
        tls=link.tls,
        dtype=link.dtype,
        tensor_transport=link.tensor_transport,
        heartbeat_s=link.heartbeat_s,
        hard_deadline_s=link.hard_deadline_s,
        device=settings.device,
    )


def colocated_link(
    settings: VerifierSettings,
    fuser: FeatureFuser,
    *,
    verifier_id: str,
    target_fingerprint: str,
    vocabulary: int,
    drafter: DrafterSettings | None = None,
) -> VerifierLink:
    """A drafter on the target's own device. drafter: its settings; None = they follow the verifier's.

    Raises ConfigError for a checkpoint that cannot be served, LinkError for one that does not fit.
    """
    from cluster.link.local import LocalLink
    from drafter_service.engine import DrafterEngine

    engine = DrafterEngine(drafter or _following(settings), threaded=False)  # a thread on the same device gains nothing
    return LocalLink(
        engine,
        verifier_id=verifier_id,
        target_fingerprint=target_fingerprint,
        feature_version=fuser.feature_version,
        hidden=fuser.hidden,
        vocabulary=vocabulary,
        dtype=settings.dtype,
        load=engine.load,
    )


def _following(settings: VerifierSettings) -> DrafterSettings:
    assert settings.drafter is not None, "settings that draft without a drafter are refused when they are read"
    return DrafterSettings(
        checkpoint=settings.drafter,
        target=settings.target,
        dtype=settings.dtype,
        device=settings.device,
        kernels=settings.kernels,
        threads=settings.threads_per_rank,
        max_contexts=settings.max_requests,
        max_queue=settings.max_requests,
    )
