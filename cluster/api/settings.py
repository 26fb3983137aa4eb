"""Settings of the router: pydantic, validated before anything is loaded."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RouterSettings(BaseModel):
    """Limits and keys of one router replica. The model's name and checkpoint stand elsewhere, once. Seconds, bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    aliases: tuple[str, ...] = Field((), description="further names that clients may give as `model`")
    api_keys: tuple[str, ...] = Field((), description="accepted as `Authorization: Bearer KEY`; none = open to all")
    max_in_flight: int = Field(1024, ge=1, description="choices being generated; over it 503 with Retry-After")
    max_choices: int = Field(128, ge=1, description="of one request: prompts times n")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="of a request's body; over it 413")
    body_timeout_s: float = Field(30.0, gt=0, description="for a request's body to arrive; over it 408")
    request_timeout_s: float = Field(600.0, gt=0, description="from a request's arrival to its last token")
    default_max_tokens: int | None = Field(
        None,
        ge=1,
        description="where the client gives none; None = 16 for completions, the rest of the context for chat",
    )
    max_failovers: int = Field(2, ge=0, description="of one choice, each to an engine that it has not been on")
    retry_after_s: float = Field(1.0, gt=0, description="told to a client that is turned away for overload")
    connect_timeout_s: float = Field(5.0, gt=0, description="for an engine to accept and introduce itself")
    probe_interval_s: float = Field(0.5, gt=0, le=60)
    engine_silence_s: float = Field(30.0, gt=0, description="without a word of an engine: its requests go elsewhere")
    health_window_s: float = Field(5.0, gt=0, description="an engine's last answer counts as healthy for so long")
