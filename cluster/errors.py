"""The errors that cross a boundary. Each is written for the person who can act: field, value, cure."""

from __future__ import annotations


class PacelineError(Exception):
    """Base of every error that Paceline raises on purpose."""


class ConfigError(PacelineError):
    """A deploy file, checkpoint or argument that cannot work: names the key, the value and the cure."""


class RequestError(PacelineError):
    """A request that cannot be served as it stands (HTTP 400). `field` is the client's name of the parameter."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class OverloadedError(PacelineError):
    """A queue or cache is full (HTTP 503 with Retry-After). `retry_after_s` in seconds."""

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDiedError(PacelineError):
    """The engine that held a request died, and no other could take it over (HTTP 503)."""


class LinkError(PacelineError):
    """A link was refused or broke. Never fails a request: it ends an epoch."""


class SecretError(PacelineError):
    """The other end of a connection does not know the same shared secret: a person has to act."""


class ProtocolError(PacelineError):
    """Bytes that are no frame of ours: too long, malformed or of another type."""
