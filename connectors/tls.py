"""Whom a connection is encrypted to, and who we are to them."""

import base64
import hashlib
import os
import ssl
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from connectors.settings import Pem, Secret


class WrongKey(ssl.SSLCertVerificationError):  # what happened, in two words
    """The certificate is trusted, but its key is not one of those that are pinned."""


def tls(
    ca: Pem | None, *, certificate: Pem | None = None, key: Secret | None = None, pins: Collection[str] = ()
) -> ssl.SSLContext:
    """Always verifies; `ca` replaces the system's authorities.  `certificate` and `key` are ours, for partners that ask.

    With `pins` the partner's key must be one of them (base64 of the SHA-256 of its SubjectPublicKeyInfo), on top.
    """
    context = ssl.create_default_context(cadata=None if ca is None else ca.reveal())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None and key is not None:
        with _readable(certificate.bytes + b"\n" + key.bytes) as path:
            context.load_cert_chain(path, password=lambda: b"")  # one that wants a password fails, and asks nobody
    if pins:
        context.sslobject_class, context.sslsocket_class = _pinned(frozenset(pins))
    return context


def certificates(pem: Pem) -> Pem:
    """Lets pass what `tls` can use; for settings."""
    try:
        tls(pem)
    except ssl.SSLError:
        raise ValueError("holds no certificates; write file:PATH of a PEM file") from None
    return pem


@contextmanager
def _readable(pem: bytes) -> Iterator[str]:
    """A path at which OpenSSL finds it, which is on no disk."""
    number = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(number, pem)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _pinned(pins: frozenset[str]) -> tuple[type[ssl.SSLObject], type[ssl.SSLSocket]]:
    """Both look before a byte is sent: what is refused in the handshake was never connected."""

    class PinnedObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            _look(self.getpeercert(binary_form=True), pins)

    class PinnedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002  as the standard library has it
            super().do_handshake(block)
            _look(self.getpeercert(binary_form=True), pins)

    return PinnedObject, PinnedSocket


def _look(certificate: bytes | None, pins: frozenset[str]) -> None:
    if certificate is None or spki(certificate) not in pins:
        raise WrongKey


def spki(certificate: bytes) -> str:
    """What pins the key of a certificate (DER)."""
    from cryptography import x509  # noqa: PLC0415 — it takes a while, and only a pin needs it
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415

    key = x509.load_der_x509_certificate(certificate).public_key()
    told = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(told).digest()).decode()
