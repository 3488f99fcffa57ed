"""The kind `http`: what a configuration may say of it.  What it does stands in http.py, which brings an HTTP client."""

from typing import Annotated

from pydantic import AfterValidator

from connectors import Connector, Kind, Opening
from connectors.settings import Network, Pem, SigningSecret, Url
from connectors.tls import certificates
from connectors.way_out import WayOut


class HttpSettings(WayOut):
    url: Url
    """Where to post."""
    secret: SigningSecret
    """Signs what is sent, as Standard Webhooks 1.0 lays down."""
    allow: tuple[Network, ...] = ()
    """The addresses that it may connect to; left out, it may connect to public ones."""
    ca: Annotated[Pem, AfterValidator(certificates)] | None = None
    """Certificates (PEM) of the authorities to trust instead of the system's; usually file:PATH."""


def connect(opening: Opening) -> Connector:
    from connectors.http import Http  # noqa: PLC0415 — a configuration is read, and its mistakes told, without it

    assert isinstance(opening.settings, HttpSettings)
    return Http(opening, opening.settings)


KIND = Kind(name="http", settings=HttpSettings, connect=connect, hands_on=True)
