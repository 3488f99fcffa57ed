"""Policies, routes and sources as the program has them: read from a file, by the loader."""

import base64
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent

from multidict import CIMultiDict, CIMultiDictProxy

from gateway.authenticate import Presented, Scheme, scheme_for
from gateway.config import Config, load
from gateway.minimize import Minimized, Policies, Unmet, Unreadable
from gateway.routes import Routes

KEY = b"key-of-pseudonyms-of-32-bytes-00"
FACILITIES = "north: {name: North Hospital}\nsouth: {name: South Clinic}\n"
DESTINATION = "{connector: http, url: https://partner.example/, secret: env:OUT_SECRET}"


def whsec(text: str) -> str:
    return "whsec_" + base64.b64encode(text.encode()).decode()


ENVIRON = {"OUT_SECRET": whsec("out-secret-of-32-bytes-000000000"), "TOKEN": "odoo-token-of-32-bytes-000000000"}


def policies(text: str) -> Policies:
    """The policies in `text`, which one source accepts in their order."""
    names = [line.partition(":")[0] for line in text.splitlines() if line[:1].strip() and not line.startswith("#")]
    config = configured(
        policies=text, sources=f"posts: {{scheme: odoo-native, token: env:TOKEN, accepts: [{', '.join(names)}]}}\n"
    )
    return Policies([config.policies[name] for name in config.sources["posts"].accepts], key=KEY)


def policy(keep: str, **others: str) -> Policies:
    """One policy that keeps `keep`, a YAML mapping of fields."""
    lines = {"version": "1", "purpose": "a test", "type": "test.posted", "keep": f"{{{keep}}}", **others}
    return policies("only:\n" + indent("\n".join(f"{key}: {value}" for key, value in lines.items()), "  ") + "\n")


def kept(field: str, given: str | bytes) -> object:
    """What is kept of `given`, JSON that stands where `field` (a YAML mapping without from) looks; None if nothing is."""
    match minimized(policy(f"it: {{from: it, {field}}}"), given):
        case Minimized() as found:
            return found.data.get("it")
        case refused:
            return refused


def minimized(of: Policies, given: str | bytes) -> Minimized | Unreadable | Unmet:
    given = given if isinstance(given, bytes) else given.encode()
    return of.minimize(b'{"it": ' + given + b"}")


def routes(text: str, *, keep: str, sources: tuple[str, ...] = ("odoo", "lab"), to: tuple[str, ...]) -> Routes:
    """The routes in `text`, for events of one policy that keeps `keep`."""
    declared = {
        "version": "1",
        "purpose": "a test",
        "type": '"{kind}"',
        "subject": '"orders/{kind}"',
        "keep": f"{{kind: {{from: kind, {KINDS}}}, {keep}}}",
    }
    place = "{from: site, of: {N: north, S: south}}"
    policy = "\n".join(f"{key}: {value}" for key, value in {**declared, "facility": place}.items())
    config = configured(
        sources="".join(f"{name}: {{scheme: odoo-native, token: env:TOKEN, accepts: [only]}}\n" for name in sources),
        policies="only:\n" + indent(policy, "  ") + "\n",
        routes=text,
        destinations="".join(f"{name}: {DESTINATION}\n" for name in to),
    )
    return Routes(config.routes, give_up={name: it.retry.give_up for name, it in config.destinations.items()})


PUBLIC_URL = "https://gateway.example"
NOW = 1795413918


def scheme(text: str, environ: Mapping[str, str], *, public_url: str = PUBLIC_URL) -> Scheme:
    """That of the source `posts`, whose other keys are `text`."""
    sources, serve = f"posts: {{accepts: [only], {text}}}\n", f"public_url: '{public_url}'\n"
    config = configured(sources=sources, serve=serve, environ=environ)
    return scheme_for(config.sources["posts"], config.serve)


def presented(
    headers: Mapping[str, str] | list[tuple[str, str]],
    body: bytes,
    *,
    at: float = NOW,
    token: str | None = None,
    target: str = "/hooks/posts",
    vouched: bool = False,
) -> Presented:
    proxy = CIMultiDictProxy(CIMultiDict(headers))
    return Presented(headers=proxy, body=body, target=target, token=token, peer=None, at=at, vouched=vouched)


KINDS = "type: code, pattern: '[a-z_]+([.][a-z_]+)*'"


def configured(*, environ: Mapping[str, str] | None = None, **sections: str) -> Config:
    """A whole configuration: the sections that are given, and what it cannot be without."""
    whole = {
        "sources": "posts: {scheme: odoo-native, token: env:TOKEN, accepts: [only]}\n",
        "policies": "only: {version: 1, purpose: a test, type: test.posted, keep: {id: {from: id, type: int}}}\n",
        "routes": "all: {to: [partner]}\n",
        "destinations": f"partner: {DESTINATION}\n",
        "facilities": FACILITIES,
        **sections,
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sluicegate.yaml"
        path.write_text("".join(f"{name}:\n{indent(text, '  ')}" for name, text in whole.items()))
        return load(path, {**ENVIRON, **(environ or {})})
