"""TLS between services, mutual: each end shows a certificate that the application's own authority has signed."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import ConfigError


class TlsFiles(BaseModel):
    """PEM files, at these paths on every node that runs a service. Host names in certificates are not compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: str = Field(description="of this service, with intermediates if there are any")
    key: str = Field(description="of the certificate, without a passphrase")
    authority: str = Field(description="whose certificates are accepted: use one of your own, not a public one")


@dataclass(frozen=True)
class Access:
    """What guards a connection: the secret that both ends have to know, and TLS if there is any."""

    secret: str = ""
    tls: TlsFiles | None = None


OPEN = Access()  # on this machine only


def listener_context(files: TlsFiles | None) -> ssl.SSLContext | None:
    """None without files. Raises ConfigError for files that cannot be used."""
    return _context(ssl.PROTOCOL_TLS_SERVER, files)


def dialler_context(files: TlsFiles | None) -> ssl.SSLContext | None:
    """None without files. Raises ConfigError for files that cannot be used."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, files)


def _context(protocol: int, files: TlsFiles | None) -> ssl.SSLContext | None:
    if files is None:
        return None
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # replicas are found by address, wherever they were placed
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
        context.load_verify_locations(files.authority)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigError(
            f"verifier.link.tls cannot be used: certificate {files.certificate!r}, key {files.key!r}, authority "
            f"{files.authority!r}: {error}; give readable PEM files, the key without a passphrase"
        ) from error
    return context


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")
