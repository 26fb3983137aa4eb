"""An authority of our own and certificates signed by it, for tests of TLS."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.tls import TlsFiles

Key = ec.EllipticCurvePrivateKey


def tls_files(directory: Path) -> TlsFiles:
    """A new authority and one certificate of it, for both ends."""
    directory.mkdir(parents=True, exist_ok=True)
    authority_key, service_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _certificate("authority", authority_key, "authority", authority_key, is_authority=True)
    service = _certificate("service", service_key, "authority", authority_key, is_authority=False)
    paths = {name: directory / f"{name}.pem" for name in ("certificate", "key", "authority")}
    paths["certificate"].write_bytes(service.public_bytes(serialization.Encoding.PEM))
    paths["authority"].write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    paths["key"].write_bytes(
        service_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return TlsFiles(**{name: str(path) for name, path in paths.items()})


def _certificate(name: str, key: Key, issuer: str, issuer_key: Key, is_authority: bool) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer_name=_named(issuer),
        subject_name=_named(name),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(hours=1),
        not_valid_after=now + timedelta(days=1),
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    return builder.sign(issuer_key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
