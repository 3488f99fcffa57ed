"""Senders that sign, keep a ledger, and try again honestly: what they do not know they send again under the same id."""

import asyncio
import base64
import hashlib
import hmac
import json
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

import aiohttp

from chaos.ledger import Ledger, Said, Sent
from outbox.ending import end

SECRET = "whsec_" + base64.b64encode(b"shop-secret-of-32-bytes-00000000").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"other-secret-of-32-bytes-0000000").decode()
CANARY = "canary-Maria-Example-1980"
PATIENCE = aiohttp.ClientTimeout(total=10)
LONGEST_WAIT = 4.0  # before it is sent again
MOST = 300  # orders that nobody knows about: senders who each try again for ever would be a flood of their own
LOTS = 17


class Load:
    """So many orders a second, evenly, whatever becomes of those before: an open loop."""

    def __init__(self, path: Path, gateways: Sequence[str], *, seed: int) -> None:
        self._ledger = Ledger(path)
        self._gateways = list(gateways)
        self._numbers = count(1)
        self._chance = random.Random(seed)
        self._run = f"{seed:08x}{time.time_ns():016x}"
        self._sending: set[asyncio.Task[Said]] = set()
        self._pace: asyncio.Task[None] | None = None
        self._giving_up = asyncio.Event()
        self._session = aiohttp.ClientSession(timeout=PATIENCE, connector=aiohttp.TCPConnector(limit=256))
        self.secret = SECRET
        self.took: list[tuple[float, float]] = []  # (when, seconds) of each first request that was answered 202

    # ── the pace ─────────────────────────────────────────────────────────────────────────────────

    def start(self, per_second: float) -> None:
        self._pace = asyncio.create_task(self._keep_pace(per_second))

    async def _keep_pace(self, per_second: float) -> None:
        began, sent = time.monotonic(), 0
        while True:
            while sent < (time.monotonic() - began) * per_second:
                sent += 1
                if len(self._sending) >= MOST:
                    continue
                task = asyncio.create_task(self.send())
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
            await asyncio.sleep(0.5 / per_second)

    async def pause(self) -> None:
        if self._pace is not None:
            await end(self._pace)
            self._pace = None

    async def end(self, within: float = 20) -> None:
        """No new ones; those that are not known yet are tried for so long, and then stay unknown."""
        await self.pause()
        if self._sending:
            await asyncio.wait(self._sending, timeout=within)
        self._giving_up.set()
        if self._sending:
            await asyncio.wait(self._sending, timeout=10)
        await self._session.close()
        self._ledger.close()

    # ── one order ────────────────────────────────────────────────────────────────────────────────

    def number(self) -> int:
        return next(self._numbers)

    def id_of(self, n: int) -> str:
        return f"msg_{self._run}_{n}"

    async def send(self, n: int | None = None) -> Said:
        """Until it is known what became of it."""
        n = self.number() if n is None else n
        body = order(n)
        wait = 0.1
        while True:
            sent = await self.post(n, body)
            if sent.said is not Said.UNKNOWN or self._giving_up.is_set():
                return sent.said
            with suppress(TimeoutError):
                async with asyncio.timeout(wait * self._chance.uniform(0.5, 1.5)):
                    await self._giving_up.wait()
            wait = min(wait * 2, LONGEST_WAIT)

    async def post(
        self,
        n: int,
        body: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        path: str = "/hooks/shop",
        to: str | None = None,
    ) -> Sent:
        """One request, and its line in the ledger; what was not even connected is not there, but who knows."""
        at = time.time()
        status: int | None = None
        event, duplicate = None, False
        try:
            async with self._session.post(
                f"{to or self._chance.choice(self._gateways)}{path}",
                data=body,
                headers=signed(body, id=self.id_of(n), secret=self.secret) if headers is None else headers,
            ) as answer:
                read = await answer.read()
                status = answer.status
                if status in {200, 202}:
                    told = json.loads(read)
                    event, duplicate = told["id"], told["duplicate"]
        except (aiohttp.ClientError, OSError, TimeoutError):
            status = None
        sent = Sent(
            n=n, at=at, ended=time.time(), said=said_by(status), status=status, event=event, duplicate=duplicate
        )
        self._ledger.add(sent)
        if status == 202:
            self.took.append((at, sent.ended - at))
        return sent


def said_by(status: int | None) -> Said:
    match status:
        case 200 | 202:
            return Said.OK
        case 429:
            return Said.UNKNOWN  # not stored, and to be tried again
        case int() if 400 <= status < 500:
            return Said.REFUSED
        case _:
            return Said.UNKNOWN


def order(n: int, **changes: object) -> bytes:
    """A new order, with more in it than the policy keeps."""
    made = {"kind": "order", "id": n, "status": "paid", "lot": n % LOTS, "customer": {"name": CANARY}, **changes}
    return json.dumps(made).encode()


def signed(body: bytes, *, id: str, secret: str = SECRET, at: float | None = None) -> dict[str, str]:  # noqa: A002
    """The headers of Standard Webhooks, made without the program's own code."""
    moment = int(time.time() if at is None else at)
    key = base64.b64decode(secret.removeprefix("whsec_"))
    mac = hmac.new(key, f"{id}.{moment}.".encode() + body, hashlib.sha256).digest()
    return {
        "content-type": "application/json", "webhook-id": id, "webhook-timestamp": str(moment),
        "webhook-signature": "v1," + base64.b64encode(mac).decode(),
    }  # fmt: skip
