"""HTTP Message Signatures (RFC 9421), with the body bound by its Content-Digest (RFC 9530).

    Content-Digest:  sha-256=:…:
    Signature-Input: sig=("@method" "@path" "content-digest");created=1795413918;keyid="edge-1";nonce="…"
    Signature:       sig=:…:

What must be signed is configured, and the algorithm is that of our key, whatever the message says of it.  A message is
signed as its sender saw it: what only the outside knows (`@authority`, `@target-uri`) comes from `serve.public_url`.
"""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn
from urllib.parse import urlsplit

import http_sf

from gateway.authenticate.presented import Caller, Presented, Reason, Unauthorized, is_id
from gateway.authenticate.timed_keys import Span, span_of
from gateway.config_sections import HttpSignature
from gateway.verifying_keys import VerifyingKey, verifying_key

Parameters = Mapping[str, Any]


class HttpSignatureScheme:
    def __init__(self, source: HttpSignature, *, public_url: str | None) -> None:
        self._keys: dict[str, tuple[int, VerifyingKey, Span]] = {
            keyid: (place, verifying_key(timed.secret.reveal()), span_of(timed))
            for place, (keyid, timed) in enumerate(source.keys.items())
        }
        self._required = frozenset(source.components)
        self._tolerance = source.tolerance
        self._public_url = public_url

    async def authenticate(self, presented: Presented) -> Caller | Unauthorized:
        given = presented.once("signature-input", "signature", "content-digest")
        if isinstance(given, Unauthorized):
            return given
        inputs, signatures, digests = map(dictionary, given)
        if inputs is None or signatures is None or digests is None:
            return Unauthorized(Reason.MALFORMED_HEADER)
        answer: Caller | Unauthorized = Unauthorized(Reason.UNKNOWN_KEY)
        for label in list(inputs)[:_MOST]:  # a proxy may have added a signature of its own
            match inputs[label], signatures.get(label):
                case (list(items), {"keyid": str(keyid)} as parameters), (bytes(signature), _) if keyid in self._keys:
                    answer = self._judge(presented, items, parameters, signature)
                case _:
                    continue
            if isinstance(answer, Caller):
                return answer if _is_of(digests, presented.body) else Unauthorized(Reason.WRONG_BODY)
        return answer

    def _judge(
        self, presented: Presented, items: Sequence[Any], parameters: Parameters, signature: bytes
    ) -> Caller | Unauthorized:
        """One signature, by a key of ours."""
        keyid = parameters["keyid"]
        place, key, (begins, ends) = self._keys[keyid]
        covered = _covered(items)
        algorithm = parameters.get("alg", key.algorithm)
        if covered is None or type(algorithm) is not str or algorithm != key.algorithm:
            return Unauthorized(Reason.MALFORMED_HEADER)
        if not self._required <= frozenset(covered):
            return Unauthorized(Reason.UNSIGNED_PART)
        if untimely := _untimely(parameters, presented.at, self._tolerance):
            return untimely
        if not begins <= presented.at < ends:
            return Unauthorized(Reason.NO_ACTIVE_SECRET)
        nonce = parameters.get("nonce")
        if nonce is not None and not (isinstance(nonce, str) and is_id(nonce)):
            return Unauthorized(Reason.MALFORMED_ID)
        base = signature_base(covered, parameters, presented, self._public_url)
        if base is None:
            return Unauthorized(Reason.MALFORMED_HEADER)
        if not key.verifies(signature, base):
            return Unauthorized(Reason.WRONG_SIGNATURE)
        return Caller(signed_id=None if nonce is None else f"{keyid} {nonce}", secret=place)

    async def close(self) -> None:
        """Holds nothing."""


def dictionary(field: str) -> dict[str, Any] | None:
    """A dictionary of RFC 8941, each member with its parameters; none of its keys stands twice."""
    try:
        parsed: Any = http_sf.parse(field.encode("ascii"), tltype="dictionary", on_duplicate_key=_refuse)
    except (ValueError, OverflowError):
        return None
    return dict(parsed)


def signature_base(
    covered: Sequence[str], parameters: Parameters, presented: Presented, public_url: str | None
) -> bytes | None:
    """What is signed, line by line; None if a part of it is not there."""
    lines = []
    for name in covered:
        value = _derived(name, presented, public_url) if name.startswith("@") else _field(name, presented)
        if value is None or not value.isascii() or not value.replace("\t", " ").isprintable():
            return None
        lines.append(f'"{name}": {value}')
    items = [(name, dict[str, Any]()) for name in covered]
    lines.append(f'"@signature-params": {signature_parameters(items, parameters)}')
    return "\n".join(lines).encode("ascii")


def signature_parameters(items: Sequence[tuple[str, Any]], parameters: Parameters) -> str:
    """As Signature-Input has them behind its label."""
    members: list[Any] = [(list(items), dict(parameters))]
    return http_sf.ser(members)


def content_digest(body: bytes) -> str:
    return http_sf.ser({"sha-256": hashlib.sha256(body).digest()})


def _is_of(digests: Mapping[str, Any], body: bytes) -> bool:
    """Every digest that we can make is right, and there is one."""
    known = [(algorithm, digests[name][0]) for name, algorithm in _DIGESTS.items() if name in digests]
    right = [
        isinstance(given, bytes) and hmac.compare_digest(hashlib.new(algorithm, body).digest(), given)
        for algorithm, given in known
    ]
    return bool(right) and all(right)


def _covered(items: Sequence[Any]) -> list[str] | None:
    """The names of what is signed; None if one stands twice, or is a part of a field, which is not read here."""
    names = [name for name, parameters in items if type(name) is str and not parameters]
    if len(names) != len(items) or len(set(names)) != len(names):
        return None
    return names if all(name == name.lower() and name not in _OWN for name in names) else None


def _untimely(parameters: Parameters, at: float, tolerance: timedelta) -> Unauthorized | None:
    created, expires = parameters.get("created"), parameters.get("expires")
    if type(created) is not int or (expires is not None and type(expires) is not int):
        return Unauthorized(Reason.MALFORMED_TIMESTAMP)
    if created - at > tolerance.total_seconds():
        return Unauthorized(Reason.TOO_NEW)
    if at - created > tolerance.total_seconds() or (expires is not None and at > expires):
        return Unauthorized(Reason.TOO_OLD)
    return None


def _field(name: str, presented: Presented) -> str | None:
    values = presented.headers.getall(name, ())
    return ", ".join(value.strip(" \t") for value in values) if values else None


def _derived(name: str, presented: Presented, public_url: str | None) -> str | None:
    """A part of the request that is no field, as its sender knows it: behind a proxy, the path may be longer than here."""
    if not presented.target.startswith("/"):
        return None
    outside = urlsplit(public_url or "")
    path, mark, query = (outside.path + presented.target).partition("?")
    match name:
        case "@method":
            return "POST"  # nothing else comes to a source
        case "@path":
            return path
        case "@query":
            return f"?{query}"
        case "@request-target":
            return path + mark + query
        case "@target-uri" if public_url:
            return public_url + presented.target
        case "@authority" if public_url:
            return outside.netloc.lower().removesuffix(_DEFAULT_PORT[outside.scheme])
        case "@scheme" if public_url:
            return outside.scheme
        case _:
            return None


def _refuse(key: str, context: str) -> NoReturn:
    raise ValueError(f"{key} stands twice in a {context}")


_MOST = 4  # signatures that are looked at
_OWN = {"signature", "signature-input"}
_DIGESTS = {"sha-256": "sha256", "sha-512": "sha512"}
_DEFAULT_PORT = {"https": ":443", "http": ":80"}
