"""The whole program in this process, on a fresh database, with a partner on loopback that is a real server."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import asyncpg
from aiohttp import ClientSession, web

from dead_letter.tokens import Role, Tokens
from gateway import config as configuration
from gateway.check import check
from gateway.service import Place, Service
from observability.metrics import Metrics


def whsec(text: str) -> str:
    return "whsec_" + base64.b64encode(text.encode()).decode()


ENVIRON = {
    "SHOP_SECRET": whsec("shop-secret-of-32-bytes-00000000"),
    "OUT_SECRET": whsec("out-secret-of-32-bytes-000000000"),
    "KEY": "key-of-digests-of-at-least-32-bytes",
}
CANARY = "canary-Maria-Example-1980"

CONFIGURATION = """
serve: {{listen: "127.0.0.1:0"}}
database: {dsn}
key: env:KEY
{more}
facilities:
  north: {{name: North Hospital, timezone: Europe/Berlin}}
sources:
  odoo: {{scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [purchase-order], body: 64KiB}}
policies:
  purchase-order:
    version: 3
    purpose: procurement approval
    match: {{model: purchase.order}}
    type: odoo.purchase_order.{{status}}
    subject: purchase.order/{{id}}
    time: "{{changed}}"
    facility: {{from: company_id, of: {{1: north}}}}
    keep:
      id:      {{from: id, type: int, min: 1}}
      status:  {{from: state, type: enum, of: {{"to approve": approval_requested, purchase: approved}}}}
      amount:  {{from: amount_total, type: decimal}}
      changed: {{from: write_date, type: timestamp}}
    dedup: [id, changed, status]
routes:
  approvals: {{when: {{type: odoo.purchase_order.*, data: {{amount: {{gte: 5000}}}}}}, to: [approvers], order: subject}}
destinations:
  approvers:
    connector: http
    url: {partner}/approvals
    secret: env:OUT_SECRET
    allow: [127.0.0.1/32]
    retry: {{first: 50ms, cap: 200ms, give_up: 1m}}
"""


@dataclass
class Received:
    headers: dict[str, str]
    body: bytes


@dataclass
class Partner:
    """Keeps what it is sent, and answers as its mood says: the status of the n-th request."""

    address: str = ""
    received: list[Received] = field(default_factory=list)
    mood: Callable[[int], int] = lambda _: 200

    async def take(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(headers, await request.read()))
        return web.Response(status=self.mood(len(self.received)))


@asynccontextmanager
async def partner() -> AsyncIterator[Partner]:
    partner = Partner()
    application = web.Application()
    application.router.add_post("/{path:.*}", partner.take)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    partner.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield partner
    await runner.cleanup()


@dataclass
class Program:
    """What a sender and an operator can do with the program."""

    service: Service
    session: ClientSession
    address: str
    tokens: dict[str, str] = field(default_factory=dict)

    async def post(self, payload: dict[str, object], *, id: str | None = None, **headers: str) -> tuple[int, dict]:  # noqa: A002
        body = json.dumps(payload).encode()
        signed = sign(body, id=id or f"msg_{uuid4().hex}")
        async with self.session.post(f"{self.address}/hooks/odoo", data=body, headers={**signed, **headers}) as answer:
            return answer.status, await answer.json(content_type=None)

    async def api(self, method: str, path: str, body: object = None, *, role: str = "operator") -> tuple[int, dict]:
        if role not in self.tokens:
            tokens = Tokens(self.service._operators_database)
            self.tokens[role] = await tokens.create(f"test-{role}", Role(role), by="the test")
        headers = {"Authorization": f"Bearer {self.tokens[role]}"}
        async with self.session.request(method, f"{self.address}/api/v1{path}", json=body, headers=headers) as answer:
            return answer.status, await answer.json(content_type=None)

    def metric(self, sample: str) -> float | None:
        """The value of a sample, as `name{labels}`; None where there is none."""
        for line in self.service.metrics.render().decode().splitlines():
            if line.startswith(f"{sample} "):
                return float(line.rpartition(" ")[2])
        return None

    async def delivery(self, event: str) -> dict:
        _, told = await self.api("GET", f"/events/{event}")
        return told["deliveries"][0]

    async def is_delivered(self, event: str) -> bool:
        return (await self.delivery(event))["state"] == "delivered"

    async def is_dead(self, event: str) -> bool:
        return (await self.delivery(event))["state"] == "dead"


async def stored(dsn: str) -> str:
    """Every row of every table, as text."""
    connection = await asyncpg.connect(dsn)
    try:
        tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'sluicegate'")
        return str([await connection.fetch(f'SELECT t::text FROM sluicegate."{name}" AS t') for (name,) in tables])
    finally:
        await connection.close()


async def said_by_check(folder: Path, text: str, destination: str, *, system: str) -> str:
    """What `sluicegate check` says of a destination, where neither a partner nor a Postgres answers."""
    path = folder / "sluicegate.yaml"
    path.write_text(text.format(dsn="env:DSN", partner="http://127.0.0.1:9", more=system))
    config = configuration.load(path, {**ENVIRON, "DSN": "postgresql://127.0.0.1:9/x"})
    found = [finding async for finding in check(config, version="test")]
    return next(finding.says for finding in found if finding.what == f"destination {destination}")


def order(**changes: object) -> dict[str, object]:
    """What Odoo would post of a purchase order: more than anybody is to keep."""
    return {
        "model": "purchase.order", "id": 42, "state": "to approve", "amount_total": 8625.0, "company_id": 1,
        "write_date": "2026-11-23 05:34:57.955067", "partner_name": CANARY, "notes": [CANARY], **changes,
    }  # fmt: skip


def sign(body: bytes, *, id: str, at: int | None = None) -> dict[str, str]:  # noqa: A002
    at = at or int(time.time())
    key = base64.b64decode(ENVIRON["SHOP_SECRET"].removeprefix("whsec_"))
    mac = hmac.new(key, f"{id}.{at}.".encode() + body, hashlib.sha256).digest()
    return {
        "Content-Type": "application/json", "webhook-id": id, "webhook-timestamp": str(at),
        "webhook-signature": "v1," + base64.b64encode(mac).decode(),
    }  # fmt: skip


@asynccontextmanager
async def serving(
    folder: Path, dsn: str, partner: str, *, more: str = "", configured: str = CONFIGURATION
) -> AsyncIterator[Program]:
    path = folder / "sluicegate.yaml"
    path.write_text(configured.format(dsn="env:DSN", partner=partner, more=more))
    environ = {**ENVIRON, "DSN": dsn}
    service = Service(configuration.load(path, environ), Place(role="all", dsn=dsn, workers=1, metrics=None), environ)
    await service.start(Metrics(version="test"))
    try:
        async with ClientSession() as session:
            yield Program(service, session, f"http://127.0.0.1:{service.port}")
    finally:
        await service.stop()
