"""The arguments of the application: what stands under `args` in a deploy file. No torch, no Ray."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.api.settings import RouterSettings
from deploy.unknown_keys import unknown_keys
from drafter_service.config import DrafterSettings
from verifier_service.config import VerifierSettings

Resources = dict[str, float]
Placement = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]


class RouterPart(RouterSettings):
    """The router's own settings, and how many replicas of it on what."""

    replicas: int = Field(default=1, ge=1)
    front_cpus: float = Field(default=0.1, ge=0, description="CPUs of a replica")

    @property
    def settings(self) -> RouterSettings:
        return RouterSettings(**{name: getattr(self, name) for name in RouterSettings.model_fields})


class VerifierPart(VerifierSettings):
    """The verifier's own settings, and how many replicas of it on what."""

    replicas: int = Field(default=1, ge=1)
    front_cpus: float = Field(default=0.1, ge=0, description="CPUs of a replica's front")
    rank_resources: Resources | None = Field(
        default=None, description="of each rank's bundle; None = a GPU and a CPU, or a CPU for each of a rank's threads"
    )
    architecture: str | None = Field(
        default=None,
        description="which of deploy/architectures the target is: `paceline plan` reads it where the checkpoint is "
        "not on its machine; at start the checkpoint must agree with it",
    )
    placement: Placement = Field(default="STRICT_PACK", description="of a replica's ranks; STRICT_PACK = one node")
    start_timeout_s: float = Field(default=900.0, gt=0, description="from process start to a loaded target")
    max_step_s: float = Field(
        default=30.0,
        gt=0,
        description="an engine without a step for so long is replaced; measured steps set a closer limit after warm-up",
    )
    drain_s: float = Field(
        default=20.0,
        ge=0,
        description="for requests of a replica that stops; what is left resumes on another",
    )

    @property
    def settings(self) -> VerifierSettings:
        return VerifierSettings(**{name: getattr(self, name) for name in VerifierSettings.model_fields})

    @property
    def bundles(self) -> list[Resources]:
        """Of one replica: the front's, then one for each rank."""
        resources = _resources(self.rank_resources, self.device, self.threads_per_rank)
        return [{"CPU": self.front_cpus}, *[dict(resources) for _ in range(self.tensor_parallel_size)]]


class DrafterPart(DrafterSettings):
    """The drafter's own settings, and how many replicas of it on what."""

    replicas: int = Field(default=1, ge=1)
    front_cpus: float = Field(default=0.1, ge=0, description="CPUs of a replica's front")
    architecture: str | None = Field(
        default=None, description="which of deploy/architectures the checkpoint is, as in the verifier's section"
    )
    resources: Resources | None = Field(
        default=None, description="of the model's bundle; None = a GPU and a CPU, or a CPU for each thread"
    )
    start_timeout_s: float = Field(default=600.0, gt=0, description="from process start to a loaded drafter")

    @property
    def settings(self) -> DrafterSettings:
        return DrafterSettings(**{name: getattr(self, name) for name in DrafterSettings.model_fields})

    @property
    def bundles(self) -> list[Resources]:
        return [{"CPU": self.front_cpus}, _resources(self.resources, self.device, self.threads)]


class Application(BaseModel):
    """One target under one model name. Each fact is written once:

    drafter.target defaults to verifier.target, verifier.drafter to drafter.checkpoint, and the drafter's link settings
    to the verifier's. The drafter service is started only if verifier.speculation.mode is "disaggregated".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_name: str = Field(min_length=1, description="the name that clients give as `model`")
    router: RouterPart = Field(default_factory=RouterPart)
    verifier: VerifierPart
    drafter: DrafterPart | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_keys_and_shared_defaults(cls, raw: Any) -> Any:
        if messages := unknown_keys(cls, raw):
            raise ValueError("\n".join(messages))
        return _with_shared_defaults(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _parts_agree(self) -> Application:
        if self.drafter is None:
            if self.verifier.speculation.mode == "disaggregated":
                raise ValueError(
                    "verifier.speculation.mode is 'disaggregated' but there is no drafter section: add one with "
                    "`checkpoint`, or set the mode to 'none' or 'colocated'"
                )
            return self
        for ours, theirs, mine, other in (
            ("drafter.target", "verifier.target", self.drafter.target, self.verifier.target),
            ("verifier.drafter", "drafter.checkpoint", self.verifier.drafter, self.drafter.checkpoint),
            ("drafter.token", "verifier.link.token", self.drafter.token, self.verifier.link.token),
            ("drafter.tls", "verifier.link.tls", self.drafter.tls, self.verifier.link.tls),
        ):
            if mine != other:
                shown = "" if "token" in ours else f" ({mine!r} and {other!r})"
                raise ValueError(f"{ours} and {theirs} differ{shown}: leave out {ours}, it follows the other")
        return self

    @property
    def drafts_remotely(self) -> bool:
        return self.drafter is not None and self.verifier.speculation.mode == "disaggregated"


def _with_shared_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    verifier, drafter = raw.get("verifier"), raw.get("drafter")
    if not isinstance(verifier, dict) or not isinstance(drafter, dict):
        return raw
    link = verifier.get("link")
    shared = ("token", "tls", "heartbeat_s", "hard_deadline_s")
    of_link = {key: link[key] for key in shared if key in link} if isinstance(link, dict) else {}
    of_target = {"target": verifier["target"]} if "target" in verifier else {}
    of_checkpoint = {"drafter": drafter["checkpoint"]} if "checkpoint" in drafter else {}
    return {**raw, "verifier": {**of_checkpoint, **verifier}, "drafter": {**of_target, **of_link, **drafter}}


def _resources(given: Resources | None, device: str, threads: int) -> Resources:
    if given is not None:
        return dict(given)
    return {"GPU": 1.0, "CPU": 1.0} if device == "cuda" else {"CPU": float(threads)}
