"""Whom a connection is encrypted to."""

import ssl


def tls(ca: str | None) -> ssl.SSLContext:
    """Always verifies; `ca` replaces the system's authorities."""
    context = ssl.create_default_context(cadata=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def certificates(pem: str) -> str:
    """Lets pass what `tls` can use; for settings."""
    try:
        tls(pem)
    except ssl.SSLError:
        raise ValueError("holds no certificates; write file:PATH of a PEM file") from None
    return pem
