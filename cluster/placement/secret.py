"""The secret of an application that brings none: drawn once, and kept where all of the cluster finds it again."""

from __future__ import annotations

import secrets

from ray.experimental import internal_kv

NAMESPACE = b"paceline"
BYTES = 32


def drawn_once(application: str) -> str:
    """The same for everyone who asks for this application as long as the Ray cluster lives. Needs a connection to Ray.

    It lies in the store of Ray's own head (GCS): whoever reads that can run anything on the cluster anyway. Were it
    drawn at every start, each deployment of an unchanged file would look changed to Serve and restart all replicas.
    """
    key = f"secret/{application}".encode()
    internal_kv._internal_kv_put(key, secrets.token_hex(BYTES).encode(), overwrite=False, namespace=NAMESPACE)
    return internal_kv._internal_kv_get(key, namespace=NAMESPACE).decode()
