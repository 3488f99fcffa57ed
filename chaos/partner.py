"""Partners in a process of their own, with a ledger each and moods: `python -m chaos.partner FOLDER NAME…`.

`POST /VIA/NAME` is a delivery, by the process of that name.  A partner that keeps keys (`NAME+`) does what is asked once a key, and remembers the keys over
its own restarts; another does it each time.  `POST /mood/NAME` says how it answers from now on, `GET /has/NAME/N` whether
order N took effect.  The port stands in FOLDER/port once it listens.
"""

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

import aiohttp
import msgspec
from aiohttp import web

from chaos.ledger import Answered, Ledger, Receipt, Saw, receipts
from chaos.load import signed


class Mood(msgspec.Struct, frozen=True, kw_only=True):
    """How a partner answers; `times` so often, and then well again; `only` this one order."""

    status: int = 200
    delay: float = 0.0  # after it took effect, and before it answers
    headers: dict[str, str] = {}
    how: Literal["answers", "holds", "resets", "stops half-way", "drips", "never ends", "bombs"] = "answers"
    times: int | None = None
    only: int | None = None
    per_second: int | None = None  # what is more gets a 503
    secret: str | None = None  # what is not signed with it gets a 401


WELL = Mood()
HEAD_FIRST = {"drips", "never ends", "stops half-way"}  # the status is told, whatever becomes of the rest


class Partners:
    """All partners of one stage, as the harness sees them: a process, its ledgers, its moods."""

    def __init__(self, folder: Path, keeps_keys: set[str], others: set[str]) -> None:
        self.names = keeps_keys | others
        self._folder = folder
        self._command = [
            *(sys.executable, "-m", "chaos.partner", str(folder)),
            *(f"{name}+" for name in sorted(keeps_keys)), *sorted(others),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    async def start(self) -> None:
        """Listening when it returns, at the same port as before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "port").unlink(missing_ok=True)
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [*self._command, f"--port={self.port}"], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        while not (self._folder / "port").exists():
            if self._process.poll() is not None:
                raise RuntimeError(f"the partners did not start: {(self._folder / 'output').read_text()[-2000:]}")
            await asyncio.sleep(0.02)
        self.port = int((self._folder / "port").read_text())

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def feel(self, name: str, mood: Mood = WELL) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.address}/mood/{name}", data=msgspec.json.encode(mood)) as answer,
        ):
            answer.raise_for_status()

    async def has(self, name: str, n: int) -> bool:
        async with aiohttp.ClientSession() as session, session.get(f"{self.address}/has/{name}/{n}") as answer:
            return answer.status == 200

    def receipts(self) -> list[Receipt]:
        return [receipt for name in sorted(self.names) for receipt in receipts(self._folder / f"{name}.jsonl")]


# ── in the process of its own ───────────────────────────────────────────────────────────────────────


class Partner:
    def __init__(self, folder: Path, name: str, *, keeps_keys: bool) -> None:
        path = folder / f"{name}.jsonl"
        before = receipts(path)
        self._ledger = Ledger(path)
        self._name = name
        self._keeps_keys = keeps_keys
        self._keys = {receipt.key for receipt in before if receipt.effect}
        self._number = len(before)
        self.orders = {receipt.n for receipt in before if receipt.effect}
        self._mood = WELL
        self._left: int | None = None
        self._changed = asyncio.Event()
        self._second, self._this_second = 0, 0

    def feel(self, mood: Mood) -> None:
        self._mood, self._left = mood, mood.times
        self._changed.set()
        self._changed = asyncio.Event()

    async def take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        event = json.loads(body)
        if "id" not in event["data"]:  # owed past the door: it is no order, and not noted
            return web.Response(status=self._mood.status)
        n, key = int(event["data"]["id"]), request.headers["idempotency-key"]
        mood = self._mood_for(n)
        if mood.secret is not None and not is_signed(request.headers, body, mood.secret):
            mood = Mood(status=401)
        takes = 200 <= mood.status < 300
        effect = takes and not (self._keeps_keys and key in self._keys)
        self._number += 1
        number = self._number
        self._ledger.add(
            Saw(
                number=number, partner=self._name, key=key, n=n, subject=event.get("subject"),
                digest=sha256(body).hexdigest()[:16], at=time.time(), effect=effect, via=request.match_info["via"],
            )
        )  # fmt: skip
        if takes:
            self._keys.add(key)
            self.orders.add(n)
        status = mood.status if mood.how in HEAD_FIRST else None
        try:
            answer = await self._answer(request, mood)
            status = mood.status
        finally:
            self._ledger.add(Answered(number=number, at=time.time(), status=status))
        return answer

    def _mood_for(self, n: int) -> Mood:
        mood = self._mood
        if mood.only is not None and mood.only != n:
            return WELL
        if self._left is not None:
            if self._left <= 0:
                return WELL
            self._left -= 1
        if mood.per_second is not None:
            second = int(time.time())
            self._this_second = self._this_second + 1 if second == self._second else 1
            self._second = second
            return Mood(status=503) if self._this_second > mood.per_second else WELL
        return mood

    async def _answer(self, request: web.Request, mood: Mood) -> web.StreamResponse:
        if mood.delay:
            await asyncio.sleep(mood.delay)
        transport = request.transport
        assert transport is not None
        match mood.how:
            case "answers":
                return web.Response(status=mood.status, headers=mood.headers)
            case "holds":
                await self._changed.wait()
                return web.Response(status=mood.status)
            case "resets":
                transport.abort()
                raise ConnectionResetError
            case "stops half-way":
                transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
                await asyncio.sleep(0.05)
                transport.abort()
                raise ConnectionResetError
            case "drips" | "never ends":
                answer = web.StreamResponse(status=mood.status)
                await answer.prepare(request)
                while True:
                    await answer.write(b"x" if mood.how == "drips" else b"x" * 65536)
                    await asyncio.sleep(1 if mood.how == "drips" else 0)
            case "bombs":
                return web.Response(status=mood.status, body=bomb(), headers={"content-encoding": "gzip"})


def is_signed(headers: Mapping[str, str], body: bytes, secret: str) -> bool:
    right = signed(body, id=headers["webhook-id"], at=int(headers["webhook-timestamp"]), secret=secret)
    return headers["webhook-signature"] == right["webhook-signature"]


@cache
def bomb() -> bytes:
    """100 MiB of nothing, in 100 KiB."""
    return gzip.compress(bytes(100 * 2**20), 9)


async def main(folder: Path, names: list[str], port: int) -> None:
    partners = {name.rstrip("+"): Partner(folder, name.rstrip("+"), keeps_keys=name.endswith("+")) for name in names}

    async def take(request: web.Request) -> web.StreamResponse:
        return await partners[request.match_info["name"]].take(request)

    async def feel(request: web.Request) -> web.Response:
        partners[request.match_info["name"]].feel(msgspec.json.decode(await request.read(), type=Mood))
        return web.Response()

    async def has(request: web.Request) -> web.Response:
        there = int(request.match_info["n"]) in partners[request.match_info["name"]].orders
        return web.Response(status=200 if there else 404)

    application = web.Application()
    application.router.add_post("/mood/{name}", feel)
    application.router.add_post("/{via}/{name}", take)
    application.router.add_get("/has/{name}/{n}", has)
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024, reuse_address=True).start()
    told = folder / "port.new"
    told.write_text(str(runner.addresses[0][1]))
    told.rename(folder / "port")
    parent = os.getppid()
    while os.getppid() == parent:  # whoever started it has not ended
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    *partner_names, at = sys.argv[2:]
    with suppress(KeyboardInterrupt):
        asyncio.run(main(Path(sys.argv[1]), partner_names, int(at.removeprefix("--port="))))
