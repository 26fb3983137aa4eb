"""How both ends of a connection prove that they know the shared secret, before anything else is said.

    listener -> dialler   Challenge   a fresh nonce
    dialler -> listener   Response    another nonce, what it claims to be, and a proof
    listener -> dialler   Accepted    its own proof; or Denied, and the connection closes

A proof is HMAC-SHA256, keyed by the secret, over the role of the one who gives it and all that was said before. So the
secret is never sent, an answer is worth nothing in another connection, service, epoch or role, and neither end believes
the other without one. It keeps strangers out; who can read or change the traffic itself is kept out by TLS only.

Values in, values out: the engine port drives it with asyncio (`admit`, `enter`), the link on its own connections.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
from dataclasses import dataclass

import msgspec

from cluster.errors import ConfigError, ProtocolError, SecretError
from cluster.wire import Codec

LINK, ENGINE = "link", "engine"  # services
VERSION = 1
NONCE_BYTES = 32
MAX_FRAME_BYTES = 4096  # of a stranger's frame
CURE = (
    "give all services of an application the same verifier.link.token (drafter.token follows it), or leave it out "
    "of the deploy file and let the application draw one"
)


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """service: LINK or ENGINE."""

    version: int
    service: str
    nonce: bytes


class Response(msgspec.Struct, frozen=True, tag="response"):
    """claim: what the dialler will say of itself next, e.g. verifier and epoch; "" if nothing."""

    nonce: bytes
    claim: str
    proof: bytes


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    proof: bytes


class Denied(msgspec.Struct, frozen=True, tag="denied"):
    reason: str


Message = Challenge | Response | Accepted | Denied
HANDSHAKE: Codec[Message] = Codec(Message, MAX_FRAME_BYTES)


@dataclass(frozen=True)
class Session:
    """Of a connection whose ends know each other. key: 32 bytes that only they can have, fresh for each connection."""

    claim: str
    key: bytes


class Listener:
    """The end that was dialled: send `challenge`, then what `check` returns for the answer."""

    def __init__(self, secret: str, service: str):
        self._secret = secret
        self.challenge = Challenge(VERSION, service, secrets.token_bytes(NONCE_BYTES))

    def check(self, answer: Message) -> tuple[Accepted, Session]:
        """Raises ProtocolError if it is no Response, SecretError if it proves nothing: then send `denied`."""
        if not isinstance(answer, Response):
            raise ProtocolError(f"a {type(answer).__name__} where a Response belongs")
        said = _said(self.challenge, answer.nonce, answer.claim)
        if not hmac.compare_digest(answer.proof, _proof(self._secret, "dialler", said)):
            raise SecretError(f"the other end does not know this application's secret: {CURE}")
        session = Session(answer.claim, _proof(self._secret, "session", said))
        return Accepted(_proof(self._secret, "listener", said)), session


class Dialler:
    """The end that dialled: send what `respond` returns for the challenge, and give the next message to `conclude`."""

    def __init__(self, secret: str, service: str, claim: str = ""):
        self._secret, self._service, self._claim = secret, service, claim
        self._said = b""

    def respond(self, challenge: Message) -> Response:
        """Raises ProtocolError for a challenge that is none of this service."""
        if not isinstance(challenge, Challenge):
            raise ProtocolError(f"a {type(challenge).__name__} where a Challenge belongs")
        if (challenge.version, challenge.service) != (VERSION, self._service):
            raise ProtocolError(
                f"it is a {challenge.service[:20]!r} port of handshake version {challenge.version}, not a "
                f"{self._service!r} port of version {VERSION}: use the right address, or upgrade the older end"
            )
        nonce = secrets.token_bytes(NONCE_BYTES)
        self._said = _said(challenge, nonce, self._claim)
        return Response(nonce, self._claim, _proof(self._secret, "dialler", self._said))

    def conclude(self, answer: Message) -> Session:
        """Raises SecretError if either end finds that the other does not know the secret."""
        if isinstance(answer, Denied):
            raise SecretError(f"it refuses this end's secret: {CURE}")
        if not isinstance(answer, Accepted):
            raise ProtocolError(f"a {type(answer).__name__} where an Accepted belongs")
        if not hmac.compare_digest(answer.proof, _proof(self._secret, "listener", self._said)):
            raise SecretError(f"it does not know this application's secret: {CURE}")
        return Session(self._claim, _proof(self._secret, "session", self._said))


DENIED = Denied("the secret differs")


async def admit(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, service: str, deadline_s: float
) -> None:
    """The listener's side on asyncio streams. Raises SecretError, ProtocolError, TimeoutError, IncompleteReadError."""
    listener = Listener(secret, service)
    writer.write(HANDSHAKE.pack(listener.challenge))
    async with asyncio.timeout(deadline_s):
        answer = await HANDSHAKE.read(reader)
    try:
        accepted, _ = listener.check(answer)
    except SecretError:
        writer.write(HANDSHAKE.pack(DENIED))
        raise
    writer.write(HANDSHAKE.pack(accepted))


async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, service: str) -> None:
    """The dialler's side; the deadline is the caller's. Raises SecretError, ProtocolError, IncompleteReadError."""
    dialler = Dialler(secret, service)
    writer.write(HANDSHAKE.pack(dialler.respond(await HANDSHAKE.read(reader))))
    dialler.conclude(await HANDSHAKE.read(reader))


def check_secret(secret: str, host: str, setting: str) -> None:
    """Raises ConfigError for an empty secret on anything but a loopback address. setting: the secret's name."""
    if not secret and not is_loopback(host):
        raise ConfigError(
            f"{setting} is empty, but {host!r} can be reached from other machines: set a long random one, the same for "
            "all services of the application, or stay on 127.0.0.1"
        )


def check_dialled(secret: str, host: str) -> None:
    """The dialler's twin of check_secret. Raises SecretError."""
    if not secret and not is_loopback(host):
        raise SecretError("verifier.link.token is empty, but it is on another machine: set the same on both ends")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _said(challenge: Challenge, nonce: bytes, claim: str) -> bytes:
    """Unambiguous bytes for everything that both ends have said."""
    return msgspec.msgpack.encode((challenge.version, challenge.service, challenge.nonce, nonce, claim))


def _proof(secret: str, role: str, said: bytes) -> bytes:
    # Hashed first: HMAC fills a short key up with zeros, and secrets that differ in those alone would be the same.
    key = hashlib.sha256(secret.encode()).digest()
    return hmac.digest(key, msgspec.msgpack.encode((role, said)), "sha256")
