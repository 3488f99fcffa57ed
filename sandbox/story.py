"""What the demo posts: first each thing that can happen, then something every few seconds.

Odoo's webhooks are the recorded ones, with their times moved to now; all others are made here and signed as the
configuration demands.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.resources import files
from itertools import groupby
from random import Random
from typing import Any
from uuid import uuid4

import aiohttp

from gateway.config import Config
from gateway.send import SendError, send
from sandbox.terminal import Fate, Terminal
from sandbox.watch import Watch

RECORDED = "odoo-native-webhooks.jsonl"
FORGED = {"webhook-signature": "v1,bm90IHNpZ25lZCBieSB0aGUgb25lIHRoYXQgaXQgc2F5cyBpdCBpcw=="}


class Story:
    """Posts, and says what the door answered."""

    def __init__(self, config: Config, watch: Watch, terminal: Terminal, *, ledger: str, random: Random) -> None:
        self._config = config
        self._watch = watch
        self._terminal = terminal
        self._ledger = ledger
        self._random = random
        self._recorded = recorded()

    async def opening(self) -> None:
        """About 25 seconds, in which everything happens once."""
        await self._replay_recorded()
        await self._replay_recorded()
        await asyncio.sleep(1)
        await self._post("monitoring", alert("FR-12", "info", "5.1"))
        await asyncio.sleep(1)
        await self._post("odoo", purchase(40, "to approve", 7400))
        await asyncio.sleep(1)
        await self._post("monitoring", alert("FR-12", "warning", "8.4"))
        await asyncio.sleep(1.5)
        await self._post("monitoring", alert("FR-77", "critical", "11.9"))
        await asyncio.sleep(1.5)
        await self._forge()
        await asyncio.sleep(1)
        await self._post("monitoring", alert("FR-12", "tepid", "6.0"))
        await asyncio.sleep(1)
        await self._replay_recorded()
        await asyncio.sleep(1)
        answer, message = {"order": 40, "status": "accepted"}, f"answer-{uuid4()}"
        await self._post("supplier", answer, message)
        await asyncio.sleep(0.5)
        await self._post("supplier", answer, message)
        await asyncio.sleep(1)
        await self._post("monitoring", alert("FR-31", "warning", "7.7"))
        await asyncio.sleep(2)
        await self._replay_recorded()
        await self._post("odoo", purchase(41, "to approve", 310))
        await asyncio.sleep(2)
        await self._replay_recorded()
        await asyncio.sleep(3)

    async def go_on(self) -> None:
        """Something every few seconds, until the demo ends."""
        async for _ in self._pauses():
            order, fridge = self._random.randint(42, 199), f"FR-{self._random.randint(1, 69)}"
            match self._random.randrange(8):
                case 0 | 1:
                    await self._post("odoo", purchase(order, "to approve", self._random.randint(50, 200) * 100))
                case 2 | 3:
                    await self._post("odoo", purchase(order, "purchase", self._random.randint(1, 90) * 100))
                case 4:
                    status = self._random.choice(["accepted", "changed", "rejected"])
                    await self._post("supplier", {"order": order, "status": status})
                case 5 | 6:
                    await self._post("monitoring", alert(fridge, self._random.choice(["info", "warning"]), "7.2"))
                case _:
                    unknown = f"FR-{self._random.randint(70, 999)}"
                    await self._post("monitoring", alert(unknown, "critical", "12.5"))

    async def _pauses(self) -> AsyncIterator[None]:
        while True:
            await asyncio.sleep(self._random.uniform(4, 8))
            yield

    async def _replay_recorded(self) -> None:
        """The next change that Odoo told, as often as it told it."""
        times, body = next(self._recorded, (0, b""))
        seen = 0
        for _ in range(times):
            seen += await self._post("odoo", body, quiet=True) is Fate.SAME
        if seen:
            self._terminal.happened(Fate.SAME, "purchase.order/1", f"posted by Odoo {seen} times more")

    async def _post(
        self, source: str, body: Mapping[str, Any] | bytes, message: str | None = None, *, quiet: bool = False
    ) -> Fate | None:
        """Post it as `source` would; `quiet` where the caller tells of what is the same."""
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        to = self._config.serve.listen[0]
        try:
            answer = await send(self._config.sources[source], encoded, to=to, public_url=None, id=message)
        except SendError:
            return None  # it is stopping, or its end is told elsewhere
        told = json.loads(answer.body)
        match answer.status:
            case 202:
                await self._watch.accepted(told["id"])
                return Fate.ACCEPTED
            case 200:
                if not quiet:
                    self._terminal.happened(Fate.SAME, self._watch.subject(told["id"]), f"posted again by {source}")
                return Fate.SAME
            case status:
                self._terminal.happened(
                    Fate.REFUSED, f"by {source}"[:18], f"{status} {told['title']}: {told['detail']}"
                )
                return Fate.REFUSED

    async def _forge(self) -> None:
        """A post that nobody signed, at our door and at a partner's: both refuse it."""
        stamp = {"webhook-id": f"msg_{uuid4().hex}", "webhook-timestamp": str(int(datetime.now(UTC).timestamp()))}
        body = json.dumps(alert("FR-12", "critical", "99.9")).encode()
        door = f"http://{self._config.serve.listen[0]}/hooks/monitoring"
        async with aiohttp.ClientSession() as session:
            with suppress(aiohttp.ClientError):
                headers = {**stamp, **FORGED, "content-type": "application/json"}
                async with session.post(door, data=body, headers=headers) as answer:
                    told = await answer.json()
                self._terminal.happened(
                    Fate.REFUSED, "a forged post", f"{told['status']} {told['title']}: {told['detail']}"
                )
                async with session.post(self._ledger, data=body, headers=headers):
                    pass


def recorded() -> Iterator[tuple[int, bytes]]:
    """Each change once, with how often it was posted; the first is of now, the others as much later as they were."""
    lines = files("sandbox").joinpath("samples", RECORDED).read_text(encoding="utf-8").splitlines()
    bodies = [json.loads(json.loads(line)["body"]) for line in lines]
    moved = datetime.now(UTC).replace(tzinfo=None) - _written(bodies[0])
    for body, same in groupby(bodies):
        yield len(list(same)), json.dumps({**body, "write_date": str(_written(body) + moved)}).encode()


def _written(body: Mapping[str, Any]) -> datetime:
    return datetime.fromisoformat(body["write_date"])


def purchase(order: int, state: str, amount: float) -> Mapping[str, Any]:
    """A change of a purchase order, as Odoo's own webhooks tell it."""
    return {
        "_action": "PO to gateway(#374)", "_id": order, "_model": "purchase.order", "id": order,
        "name": f"P{order:05}", "state": state, "amount_total": float(amount), "company_id": 1 + order % 2,
        "currency_id": 1, "partner_id": 8, "user_id": 2, "write_date": str(datetime.now(UTC).replace(tzinfo=None)),
    }  # fmt: skip


def alert(asset: str, severity: str, celsius: str) -> Mapping[str, Any]:
    """What a refrigerator's monitor posts; its policy keeps neither the technician nor the remark."""
    return {
        "type": "equipment.alert", "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "data": {
            "asset": asset, "site": "N", "severity": severity, "temperature": float(celsius),
            "technician": "Maria Example", "remark": "door was open",
        },
    }  # fmt: skip
