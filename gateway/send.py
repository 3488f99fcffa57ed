"""Post a file as one of the configured sources would: to try a configuration, and to see the door answer."""

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import assert_never
from uuid import uuid4

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

from connectors.standard_webhooks import Signer
from gateway.authenticate import Presented
from gateway.authenticate.twilio import sorted_fields
from gateway.config_sections import (
    AnySource,
    ApiKey,
    Basic,
    ClientCert,
    GitHub,
    Hmac,
    HttpSignature,
    Jwt,
    Listen,
    OdooNative,
    Shopify,
    Slack,
    StandardWebhooks,
    Stripe,
    TimedSecret,
    Twilio,
)
from gateway.request_body import FORM, media_of


class SendError(Exception):
    """It could not be signed or posted; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Signed:
    """A post that proves what its source is asked to prove."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Answered:
    status: int
    body: bytes


async def send(
    source: AnySource,
    body: bytes,
    *,
    to: Listen,
    public_url: str | None,
    id: str | None = None,  # noqa: A002
) -> Answered:
    """Sign `body` as the source's scheme demands and post it.  `id` is the message's; without it, a new one.

    Where the URL is signed, it is the one that senders know, `public_url`.
    """
    message = id or f"msg_{uuid4().hex}"
    return await _post(to, signed(source, body, public_url=public_url, message=message, now=datetime.now(UTC)))


def signed(source: AnySource, body: bytes, *, public_url: str | None, message: str, now: datetime) -> Signed:
    """As a sender would that has the secret; a SendError where that cannot be done here."""
    path, headers = f"/hooks/{source.name}", {"content-type": media_of(source).usual}
    match source:
        case StandardWebhooks():
            shared = [timed for timed in source.secrets if not timed.is_public]
            if not shared:
                raise SendError(
                    f"{source.name} proves itself by a private key that only its sender has: post with that."
                )
            signer = Signer(_active(shared, now))
            headers |= signer.headers(message, int(now.timestamp()), body)
        case Hmac():
            headers |= _hmac(source, body, message, now, url=f"{public_url}{path}")
        case GitHub() | Shopify() | Slack():
            headers |= _hmac(source.in_full(), body, message, now)
        case Stripe():
            headers |= _stripe(source, body, now)
        case Twilio():
            if media_of(source) is FORM:
                headers |= _twilio(source, f"{public_url}{path}".encode() + sorted_fields(body), now)
            else:
                path += f"?bodySHA256={hashlib.sha256(body).hexdigest()}"
                headers |= _twilio(source, f"{public_url}{path}".encode(), now)
        case ApiKey():
            headers[source.header] = _active(source.keys, now)
        case Basic():
            login = source.user.bytes + b":" + _active(source.secrets, now).encode()
            headers["authorization"] = f"Basic {base64.b64encode(login).decode()}"
        case OdooNative():
            path += f"/{source.token.reveal()}"
        case Jwt():
            raise SendError(
                f"{source.name} proves itself by tokens that only its issuer ({source.issuer}) can sign: "
                "have one made there, and post with it yourself."
            )
        case HttpSignature():
            headers |= _http_signature(source, body, message, now, path, public_url)
        case ClientCert():
            raise SendError(
                f"{source.name} proves itself by a client certificate, which the proxy in front verifies: "
                "post through that proxy with it."
            )
        case _:
            assert_never(source)
    return Signed(path, headers, body)


def _active(secrets: Sequence[TimedSecret], now: datetime) -> str:
    for timed in secrets:
        if (timed.not_before is None or timed.not_before <= now) and (timed.not_after is None or now < timed.not_after):
            return timed.secret.reveal()
    raise SendError("None of its secrets counts now: look at their not_before and not_after.")


def _hmac(source: Hmac, body: bytes, message: str, now: datetime, *, url: str = "") -> Mapping[str, str]:
    at = str(int(now.timestamp()))
    filled = {b"{id}": message.encode(), b"{timestamp}": at.encode(), b"{url}": url.encode()}
    before, _, after = source.signed.encode().partition(b"{body}")
    for hole, value in filled.items():
        before, after = before.replace(hole, value), after.replace(hole, value)
    digest = hmac.digest(_active(source.secrets, now).encode(), before + body + after, source.algorithm)
    written = digest.hex() if source.encoding == "hex" else base64.b64encode(digest).decode()
    headers = {source.header: source.prefix + written}
    if source.timestamp:
        headers[source.timestamp] = at
    if source.id:
        headers[source.id] = message
    return headers


def _http_signature(
    source: HttpSignature, body: bytes, message: str, now: datetime, path: str, public_url: str | None
) -> Mapping[str, str]:
    from gateway.authenticate import http_signature  # noqa: PLC0415 — its cryptography takes its time
    from gateway.verifying_keys import SharedSecret, verifying_key  # noqa: PLC0415 — as that

    keys = {keyid: (timed, verifying_key(timed.secret.reveal())) for keyid, timed in source.keys.items()}
    shared = {keyid: (timed, key) for keyid, (timed, key) in keys.items() if isinstance(key, SharedSecret)}
    if not shared:
        raise SendError(
            f"{source.name} has public keys alone: sign with the private one where it is, and post from there."
        )
    active = _active([timed for timed, _ in shared.values()], now)
    keyid, key = next((keyid, key) for keyid, (timed, key) in shared.items() if timed.secret.reveal() == active)
    headers = {"content-type": media_of(source).usual, "content-digest": http_signature.content_digest(body)}
    presented = Presented(
        headers=CIMultiDictProxy(CIMultiDict(headers)),
        body=body,
        target=path,
        token=None,
        peer=None,
        at=now.timestamp(),
    )
    parameters = {"created": int(now.timestamp()), "nonce": message, "keyid": keyid, "alg": key.algorithm}
    base = http_signature.signature_base(source.components, parameters, presented, public_url)
    if base is None:
        raise SendError(f"{source.name} signs headers that are not sent from here: {', '.join(source.components)}.")
    items = [(name, dict[str, object]()) for name in source.components]
    return {
        "content-digest": headers["content-digest"],
        "signature-input": f"sig={http_signature.signature_parameters(items, parameters)}",
        "signature": f"sig=:{base64.b64encode(key.sign(base)).decode()}:",
    }


def _stripe(source: Stripe, body: bytes, now: datetime) -> Mapping[str, str]:
    at = int(now.timestamp())
    digest = hmac.digest(_active(source.secrets, now).encode(), f"{at}.".encode() + body, "sha256")
    return {"Stripe-Signature": f"t={at},v1={digest.hex()}"}


def _twilio(source: Twilio, signed: bytes, now: datetime) -> Mapping[str, str]:
    digest = hmac.digest(_active(source.secrets, now).encode(), signed, source.algorithm)
    return {"X-Twilio-Signature": base64.b64encode(digest).decode()}


async def _post(to: Listen, post: Signed) -> Answered:
    connector = aiohttp.UnixConnector(to.path) if to.path else aiohttp.TCPConnector()
    host = to.host if to.host not in {"", "0.0.0.0", "::"} else "127.0.0.1"  # noqa: S104 — every address is also this one
    near = "http://localhost" if to.path else f"http://{f'[{host}]' if ':' in host else host}:{to.port}"
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=30)) as session,
            session.post(near + post.path, data=post.body, headers=post.headers) as answer,
        ):
            return Answered(answer.status, await answer.content.read(65536))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise SendError(
            f"Nobody answers at {to} ({type(error).__name__}): is `sluicegate serve` running with this configuration?"
        ) from error
