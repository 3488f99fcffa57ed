"""How a destination or a system is reached where the straight way is not open, or does not tell enough of who is who."""

import ssl
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from connectors.proxy import Proxy
from connectors.settings import Pem, Secret, Settings, Url, shown
from connectors.tls import certificates, tls


def _proxy(url: str) -> str:
    place = urlsplit(url)
    if place.scheme != "http" or place.path not in {"", "/"} or place.query:
        raise ValueError(f"is {shown(url)}, but a proxy is an address alone, as in http://proxy.example:3128")
    return url


def _login(login: Secret) -> Secret:
    text = login.reveal()
    if ":" not in text or not (text.isascii() and text.isprintable()):
        raise ValueError(f"holds in {login.origin} no login; write user:password there")
    return login


class WayOut(Settings):
    proxy: Annotated[Url, AfterValidator(_proxy)] | None = None
    """The HTTP proxy that it is reached through, as in http://proxy.example:3128; never one of the environment."""
    proxy_login: Annotated[Secret, AfterValidator(_login)] | None = None
    """What the proxy wants to know: user:password."""
    proxy_resolves: bool = False
    """Whether the proxy is given the name, where none can be looked up here: `allow` then only judges an address that stands in the URL."""
    certificate: Annotated[Pem, AfterValidator(certificates)] | None = None
    """Our certificate (PEM), for a partner that asks for one, with those between it and its authority; file:PATH."""
    certificate_key: Secret | None = None
    """Its private key (PEM), without a password."""
    pin: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")], ...] = ()
    """The keys that the partner may have, as base64 of the SHA-256 of its SubjectPublicKeyInfo; default: any that an authority vouches for."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.proxy is None and (self.proxy_login is not None or self.proxy_resolves):
            raise ValueError("says how to speak to a proxy, but names none; add proxy")
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError(
                "has one of certificate and certificate_key, which are of use only together; add the other"
            )
        if str(getattr(self, "url", "")).startswith("http:") and (self.certificate is not None or self.pin):
            raise ValueError("has a certificate or a pin, but its url is not encrypted; write https://")
        if self.certificate is not None:
            try:
                tls(None, certificate=self.certificate, key=self.certificate_key)
            except (ssl.SSLError, ValueError):
                raise ValueError(
                    "has a certificate_key that is not the key of its certificate; write both in PEM"
                ) from None
        return self

    @property
    def through(self) -> Proxy | None:
        if self.proxy is None:
            return None
        login = None if self.proxy_login is None else self.proxy_login.reveal()
        return Proxy(self.proxy, login, self.proxy_resolves)

    def encrypted(self, ca: Pem | None) -> ssl.SSLContext:
        return tls(ca, certificate=self.certificate, key=self.certificate_key, pins=self.pin)
