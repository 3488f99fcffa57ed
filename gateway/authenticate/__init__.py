"""Who posts: one file for each family of schemes; each answers with a Caller or Unauthorized.

Nothing that a sender writes makes a scheme raise, every comparison takes constant time, and why somebody was refused is
told to metrics and logs only.
"""

from typing import assert_never

from gateway.authenticate.api_key import ApiKeyScheme
from gateway.authenticate.basic import BasicScheme
from gateway.authenticate.hmac_signature import HmacScheme
from gateway.authenticate.odoo_native import OdooNativeScheme
from gateway.authenticate.presented import Caller, Presented, Reason, Scheme, Unauthorized
from gateway.authenticate.standard_webhooks import StandardWebhooksScheme
from gateway.authenticate.stripe import StripeScheme
from gateway.authenticate.twilio import TwilioScheme
from gateway.config_sections import (
    AnySource,
    ApiKey,
    Basic,
    ClientCert,
    GitHub,
    Hmac,
    HttpSignature,
    Jwt,
    OdooNative,
    Serve,
    Shopify,
    Slack,
    StandardWebhooks,
    Stripe,
    Twilio,
)

__all__ = ["Caller", "Presented", "Reason", "Scheme", "Unauthorized", "scheme_for"]


def scheme_for(source: AnySource, serve: Serve) -> Scheme:
    """How `source` proves who it is.  A new scheme has its keys in the configuration, a file here, and a case below."""
    match source:
        case StandardWebhooks():
            return StandardWebhooksScheme(source)
        case Hmac():
            return HmacScheme(source, public_url=serve.public_url)
        case GitHub() | Shopify() | Slack():
            return HmacScheme(source.in_full())
        case Stripe():
            return StripeScheme(source)
        case Twilio():
            return TwilioScheme(source, public_url=serve.public_url)
        case ApiKey():
            return ApiKeyScheme(source)
        case Basic():
            return BasicScheme(source)
        case Jwt():
            from gateway.authenticate.jwt_bearer import JwtScheme  # noqa: PLC0415 — its cryptography takes its time

            return JwtScheme(source)
        case HttpSignature():
            from gateway.authenticate.http_signature import HttpSignatureScheme  # noqa: PLC0415 — as that

            return HttpSignatureScheme(source, public_url=serve.public_url)
        case ClientCert():
            from gateway.authenticate.client_cert import ClientCertScheme  # noqa: PLC0415 — as that

            return ClientCertScheme(source)
        case OdooNative():
            return OdooNativeScheme(source)
    assert_never(source)
