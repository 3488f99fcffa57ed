"""Durable intake over HTTP: HMAC, policy, dedup, routes, one transaction; beside a bare aiohttp that reads and answers 202.

A process of its own posts over kept connections; the two servers take turns in every round.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import multiprocessing
import os
import time
import uuid
from pathlib import Path
from tempfile import TemporaryDirectory

from aiohttp import web

from benchmarks.rows import Figure, Ground, Row, at_least
from tests.serving import ENVIRON, order, serving

SECONDS = 3.0


def row(connections: int, goal: float) -> Row:
    return Row(
        name=f"intake-{connections}",
        what=f"accepted, durable, {connections} connections, one process",
        unit="/s",
        limit="bare aiohttp 202",
        goals=(at_least(goal),),
        seconds=50,
        take=lambda ground: take(ground, connections),
    )


async def take(ground: Ground, connections: int) -> Figure:
    values, limits = [], []
    bare = web.Application()
    bare.router.add_post("/hooks/odoo", _bare)
    runner = web.AppRunner(bare, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    with TemporaryDirectory() as folder:
        async with serving(Path(folder), ground.dsn, "http://127.0.0.1:9") as program:
            ours = program.service.port
            assert ours
            for _ in range(ground.rounds):
                limits.append(await _load(runner.addresses[0][1], connections))
                values.append(await _load(ours, connections))
    await runner.cleanup()
    return Figure(values, limits)


async def _bare(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(status=202)


async def _load(port: int, connections: int) -> float:
    """Accepted a second."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    sender = context.Process(target=_send, args=(port, connections, answers))
    sender.start()
    done = await asyncio.to_thread(answers.get)
    await asyncio.to_thread(sender.join)
    return float(done) / SECONDS


def _send(port: int, connections: int, answers: "multiprocessing.Queue[int]") -> None:
    answers.put(asyncio.run(_post_for_a_while(port, connections)))


async def _post_for_a_while(port: int, connections: int) -> int:
    end = time.monotonic() + SECONDS
    return sum(await asyncio.gather(*(_one(port, end) for _ in range(connections))))


async def _one(port: int, end: float) -> int:
    """One kept connection, raw: a client library would cost more than the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    key = base64.b64decode(ENVIRON["SHOP_SECRET"].removeprefix("whsec_"))
    accepted = 0
    while time.monotonic() < end:
        body = json.dumps(order(id=int(uuid.uuid4().int % 10**9) + 1, amount_total=1)).encode()
        message, at = os.urandom(12).hex(), int(time.time())
        mac = base64.b64encode(hmac.new(key, f"{message}.{at}.".encode() + body, hashlib.sha256).digest()).decode()
        head = (
            f"POST /hooks/odoo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"webhook-id: {message}\r\nwebhook-timestamp: {at}\r\nwebhook-signature: v1,{mac}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if length:
            await reader.readexactly(length)
        if not answer.startswith(b"HTTP/1.1 202"):
            raise RuntimeError(f"not accepted: {answer[:60]!r}")
        accepted += 1
    writer.close()
    return accepted


ROWS = (row(64, 0.5), row(8, 0.3))
