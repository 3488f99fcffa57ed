"""Posts events as signed CloudEvents, by an HTTP client that goes only where it may."""

from connectors import Connector, Kind, Opening
from connectors.settings import Network, Settings, SigningSecret, Url


class HttpSettings(Settings):
    url: Url
    """Where to post."""
    secret: SigningSecret
    """Signs what is sent, as Standard Webhooks 1.0 lays down."""
    allow: tuple[Network, ...] = ()
    """The addresses that it may connect to; left out, it may connect to public ones."""
    ca: str | None = None
    """Certificates (PEM) of the authorities to trust instead of the system's; usually file:PATH."""


def connect(opening: Opening) -> Connector:
    raise NotImplementedError


KIND = Kind(name="http", settings=HttpSettings, connect=connect)
