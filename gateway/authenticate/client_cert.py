"""A client certificate that a proxy has verified: `Client-Cert` of RFC 9440, and whose certificate it must be.

The proxy has seen that the sender holds its key, and that an authority of ours signed it.  So the header counts only from
a proxy that the configuration trusts, or on a Unix socket; from there it must not pass what a client wrote itself.
"""

import base64
import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized
from gateway.config_sections import ClientCert


class ClientCertScheme:
    """Proves who posts, not what: the body is as safe as the connections that brought it."""

    def __init__(self, source: ClientCert) -> None:
        self._sans = frozenset(_as_compared(san) for san in source.san)
        self._subjects = frozenset(source.subject)
        self._keys = frozenset(source.spki)

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        if not presented.vouched:
            return Unauthorized(Reason.UNTRUSTED_PROXY)
        given = presented.once("client-cert", longest=_LONGEST)
        if isinstance(given, Unauthorized):
            return given
        certificate = _certificate(given[0])
        if certificate is None:
            return Unauthorized(Reason.MALFORMED_HEADER)
        if not _counts(certificate, presented.at):
            return Unauthorized(Reason.EXPIRED_CERTIFICATE)
        if not self._is_pinned(certificate):
            return Unauthorized(Reason.WRONG_CERTIFICATE)
        return Caller(signed_id=None, secret=0)

    def _is_pinned(self, certificate: x509.Certificate) -> bool:
        """All kinds of pins that there are hold, each by one of its own."""
        try:
            return (
                (not self._sans or not self._sans.isdisjoint(_names(certificate)))
                and (not self._subjects or certificate.subject.rfc4514_string() in self._subjects)
                and (not self._keys or _spki(certificate) in self._keys)
            )
        except _BROKEN:
            return False

    async def close(self) -> None:
        """Holds nothing."""


def _certificate(field: str) -> x509.Certificate | None:
    if not (sequence := _BYTES.fullmatch(field)):
        return None
    try:
        return x509.load_der_x509_certificate(base64.b64decode(sequence[1], validate=True))
    except _BROKEN:
        return None


def _counts(certificate: x509.Certificate, at: float) -> bool:
    try:
        return certificate.not_valid_before_utc <= datetime.fromtimestamp(at, UTC) <= certificate.not_valid_after_utc
    except (ValueError, OverflowError, OSError):
        return False


def _names(certificate: x509.Certificate) -> Iterator[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return
    for name in found:
        match name:
            case x509.DNSName(value=dns):
                yield _as_compared(f"dns:{dns}")
            case x509.UniformResourceIdentifier(value=uri):
                yield f"uri:{uri}"
            case x509.RFC822Name(value=address):
                yield f"email:{address}"
            case x509.IPAddress(value=address):
                yield f"ip:{address}"
            case _:
                pass


def _as_compared(san: str) -> str:
    """Names of DNS are the same in capitals."""
    return san.lower() if san.startswith("dns:") else san


def _spki(certificate: x509.Certificate) -> str:
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "sha256/" + base64.b64encode(hashlib.sha256(key).digest()).decode()


_BROKEN = (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion)
"""What a certificate raises that is read part by part, when it is asked for one."""
_BYTES = re.compile(r":([A-Za-z0-9+/]+={0,2}):")
_LONGEST = 8000  # a chain of RSA-4096 does not fit, and is not asked for
