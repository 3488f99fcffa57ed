"""The partners of the demo: real servers on loopback, each with a character of its own.

    Odoo      sandbox/odoo.py: takes notes and activities on purchase orders
    ledger    keeps what is signed
    mail      makes a mail of it and hands it to an SMTP server, which has a mailbox
    on-call   has bad moments: too busy, too slow, or its answer is lost on the way
    register  refuses equipment that it does not know, until its people have entered it

The four that take events verify each signature by the rules of Standard Webhooks, and refuse what does not verify.
They share no code with the program that posts to them, as partners do not.
"""

import asyncio
import base64
import hmac
import json
import smtplib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from itertools import cycle
from typing import Any

from aiohttp import web
from aiosmtpd.smtp import SMTP, Envelope, Session

from sandbox.odoo import OdooStandIn, User

Tell = Callable[[str, str], None]
"""Hears of what a partner does: about what, and what."""

TOLERANCE = 300  # seconds that a signature may be old, or ahead
LEARNS_AFTER = 8.0  # seconds until the people of the register have entered what it did not know
TOO_SLOW = 3.0  # seconds; longer than the configuration waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where they listen, on 127.0.0.1."""

    odoo: int = 0
    events: int = 0  # ledger, mail, on-call and register
    smtp: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Partners:
    """All of them, at work."""

    odoo: OdooStandIn
    mailbox: "Mailbox"
    receivers: "Receivers"


@asynccontextmanager
async def partners(ports: Ports, secrets: Mapping[str, str], tell: Tell) -> AsyncIterator[Partners]:
    """At work inside the block.  `secrets` by the names of the destinations, and `odoo-key`."""
    gateway = User(id=7, login="gateway@hospital.example", key=secrets["odoo-key"], companies=(1, 2))
    odoo = await OdooStandIn.start(port=ports.odoo, users=[gateway])
    for number in range(1, 200):
        odoo.add("purchase.order", number, name=f"P{number:05}", state="to approve", company_id=1)
    try:
        async with Mailbox.open(ports.smtp, tell) as mailbox, Receivers.open(ports.events, tell) as receivers:
            receivers.takes("ledger", secrets["ledger"], _keep)
            receivers.takes("mail", secrets["mail"], mailbox.send)
            receivers.takes("on-call", secrets["on-call"], OnCall(tell).take)
            receivers.takes("register", secrets["register"], Register(tell).take)
            yield Partners(odoo=odoo, mailbox=mailbox, receivers=receivers)
    finally:
        await odoo.stop()


# ── those that take events ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Post:
    """One post that verified."""

    id: str
    event: Mapping[str, Any]
    request: web.Request

    @property
    def subject(self) -> str:
        return str(self.event.get("subject", "-"))


Take = Callable[[Post], Awaitable[web.Response]]


class Receivers:
    """Several partners behind one server, each at a path of its own."""

    def __init__(self, tell: Tell) -> None:
        self.url = ""
        self._tell = tell
        self._takers: dict[str, tuple[bytes, Take]] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, port: int, tell: Tell) -> AsyncIterator["Receivers"]:
        receivers = cls(tell)
        application = web.Application()
        application.router.add_post("/{name}", receivers._post)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            receivers.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            yield receivers
        finally:
            await runner.cleanup()

    def takes(self, name: str, secret: str, take: Take) -> None:
        """Post to /NAME, signed with `secret`."""
        self._takers[name] = (base64.b64decode(secret.removeprefix("whsec_")), take)

    async def _post(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._takers:
            return web.Response(status=404)
        key, take = self._takers[name]
        body = await request.read()
        if not verified(request.headers, body, key, now=time.time()):
            self._tell(name, "refuses a post whose signature is wrong")
            return web.Response(status=401)
        return await take(Post(request.headers["webhook-id"], json.loads(body), request))


def verified(headers: Mapping[str, str], body: bytes, key: bytes, *, now: float) -> bool:
    """The rules of https://www.standardwebhooks.com: fresh, and one of its signatures is over id, time and body."""
    id_, at = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not at.isascii() or not at.isdigit() or abs(now - int(at)) > TOLERANCE:
        return False
    signed = f"{id_}.{at}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    return any(
        hmac.compare_digest(expected.encode(), given.encode())
        for given in headers.get("webhook-signature", "").split(" ")
    )


async def _keep(_: Post) -> web.Response:
    return web.Response(status=204)


class OnCall:
    """Every message that is new meets its next mood; when it is sent again, all is well."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._moods = cycle([self._well, self._busy, self._too_slow, self._cut_off, self._well, self._well])
        self._known: set[str] = set()
        self._has: set[str] = set()

    async def take(self, post: Post) -> web.Response:
        if post.id in self._has:
            self._tell(post.subject, "on-call had it already, and keeps it once")
            return web.Response(status=200)
        if post.id in self._known:
            return await self._well(post)
        self._known.add(post.id)
        return await next(self._moods)(post)

    async def _well(self, post: Post) -> web.Response:
        self._has.add(post.id)
        return web.Response(status=200)

    async def _busy(self, _: Post) -> web.Response:
        return web.Response(status=503, headers={"retry-after": "1"})

    async def _too_slow(self, post: Post) -> web.Response:
        self._has.add(post.id)
        await asyncio.sleep(TOO_SLOW)
        return web.Response(status=200)

    async def _cut_off(self, post: Post) -> web.Response:
        self._has.add(post.id)
        if post.request.transport is not None:
            post.request.transport.abort()
        return web.Response(status=200)


class Register:
    """Knows the refrigerators up to FR-69; about another one it says no, and its people hear of it."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._entered: set[str] = set()
        self._asked_about: set[str] = set()

    async def take(self, post: Post) -> web.Response:
        asset = str(post.event["data"]["asset"])
        if asset in self._entered or int(asset.partition("-")[2]) < 70:
            return web.Response(status=204)
        if asset not in self._asked_about:
            self._asked_about.add(asset)
            asyncio.get_running_loop().call_later(LEARNS_AFTER, self._enter, asset, post.subject)
        return web.Response(status=422, text="there is no such asset")

    def _enter(self, asset: str, subject: str) -> None:
        self._entered.add(asset)
        self._tell(subject, "register knows it now: a replay succeeds")


# ── mail ─────────────────────────────────────────────────────────────────────────────────────────────


class Mailbox:
    """An SMTP server with one mailbox, and the partner that turns events into mails for it."""

    def __init__(self, tell: Tell) -> None:
        self.mails: list[EmailMessage] = []
        self.port = 0
        self._tell = tell
        self._mailed: set[str] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls, port: int, tell: Tell) -> AsyncIterator["Mailbox"]:
        mailbox = cls(tell)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: SMTP(mailbox, hostname="sandbox.example", ident="sandbox", loop=loop), "127.0.0.1", port
        )
        mailbox.port = server.sockets[0].getsockname()[1]
        try:
            yield mailbox
        finally:
            server.close()
            await server.wait_closed()

    async def send(self, post: Post) -> web.Response:
        """What the mail partner does with an event; one that it has mailed is not mailed again."""
        if post.id not in self._mailed:
            await asyncio.to_thread(self._hand_over, _mail(post.event))
            self._mailed.add(post.id)
        return web.Response(status=204)

    def _hand_over(self, mail: EmailMessage) -> None:
        with smtplib.SMTP("127.0.0.1", self.port, timeout=5) as smtp:
            smtp.send_message(mail)

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 — aiosmtpd's
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        self._tell(str(mail["x-subject"]), f"mail no. {len(self.mails)} is in the mailbox")
        return "250 Message accepted for delivery"


def _mail(event: Mapping[str, Any]) -> EmailMessage:
    mail = EmailMessage()
    mail["from"] = "gateway@hospital.example"
    mail["to"] = "approvals@hospital.example"
    mail["subject"] = f"{event['subject']} waits for approval"
    mail["x-subject"] = str(event["subject"])
    mail.set_content(f"{event['type']} of {event['time']}\n\n{json.dumps(event['data'], indent=2)}\n")
    return mail
