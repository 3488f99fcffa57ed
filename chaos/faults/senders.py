"""Senders that are hostile, broken or too many; and what a machine does around the program."""

import asyncio
import os
import random
import signal
import time
from contextlib import suppress

import aiohttp

from chaos.faults import fault
from chaos.faults.elsewhere import owe
from chaos.ledger import Said
from chaos.load import OTHER_SECRET, order, signed
from chaos.partner import WELL, Mood
from chaos.stage import KEEPER, Plan, Stage

ATTACKERS = 500
MANY = 14_000  # more than the lines that wait to be written


def nested(depth: int) -> bytes:
    return b'{"kind":"order","id":' + b"[" * depth + b"]" * depth + b"}"


@fault(31, "bodies that break parsers: NUL, lone surrogates, 60,000 levels, 1e200000, and random bytes")
async def bodies(stage: Stage) -> None:
    chance = random.Random(stage.seed)
    told: dict[int, int] = {}
    bad = [
        nested(30_000),
        b'{"kind":"order","id":1e200000,"status":"paid","lot":1}',
        b'{"kind":"order","id":"\\u0000","status":"paid","lot":1}',
        b'{"kind":"order","id":1,"status":"\\ud800","lot":1}',
        b'{"kind":"order","id":1,"id":2,"status":"paid","lot":1}',
        b'\xef\xbb\xbf{"kind":"order"',
        b"[" * 60_000,
        b'"' + b"\\u0000" * 9000 + b'"',
        b"null",
        b"",
        *(chance.randbytes(chance.randint(1, 2000)) for _ in range(60)),
    ]
    for body in bad:
        stage.injected += 1
        n = stage.load.number()
        sent = await stage.load.post(n, body, headers=signed(body, id=stage.load.id_of(n)))
        told[sent.status or 0] = told.get(sent.status or 0, 0) + 1
    stage.demand(set(told) <= {400, 413, 422}, f"each is a 4xx: {told}")
    await stage.recovered()
    stage.note = ", ".join(f"{n} × {status}" for status, n in sorted(told.items()))


@fault(37, "a signature that is replayed: in time, too late, at another source, at another path", Plan(
    sources="  other: {scheme: standard-webhooks, secrets: [env:OTHER_SECRET], accepts: [order]}",
))  # fmt: skip
async def replayed(stage: Stage) -> None:
    n = stage.load.number()
    body = order(n)
    headers = signed(body, id=stage.load.id_of(n))
    first = await stage.load.post(n, body, headers=headers)
    again = await stage.load.post(n, body, headers=headers)
    stage.demand((again.status, again.event) == (200, first.event), f"in time it is the first one: {again.status}")
    for at in (time.time() - 3600, time.time() + 3600):
        m = stage.load.number()
        late = await stage.load.post(m, order(m), headers=signed(order(m), id=stage.load.id_of(m), at=at))
        stage.demand(late.status == 401, f"an hour off is not proven: {late.status}")
    m = stage.load.number()
    signature = signed(order(m), id=stage.load.id_of(m))
    for path, status in (("/hooks/other", 401), ("/hooks/none", 404), ("/hooks/shop/token", 404)):
        answer = await stage.load.post(m, order(m), headers=signature, path=path)
        stage.demand(answer.status == status, f"{path} answers {status}, not {answer.status}")
    m = stage.load.number()
    forged = await stage.load.post(m, order(m), headers=signed(order(m), id=stage.load.id_of(m), secret=OTHER_SECRET))
    stage.demand(forged.status == 401, f"another key is not proven: {forged.status}")
    stage.injected = 7
    await stage.recovered()


@fault(38, "the same signed id with another body")
async def same_id(stage: Stage) -> None:
    for _ in range(10):
        stage.injected += 1
        n = stage.load.number()
        first = await stage.load.send(n)
        stage.demand(first is Said.OK, "the first is taken")
        m = stage.load.number()
        other = await stage.load.post(m, order(m), headers=signed(order(m), id=stage.load.id_of(n)))
        stage.demand(other.status == 409, f"the second is a 409, not {other.status}")
    await stage.recovered()


@fault(39, "the secret of a source is changed under load", Plan(dispatchers=1))
async def rotated(stage: Stage) -> None:
    """Both are good for a while; senders change over; the old one goes."""
    program = stage.gateway
    program.reconfigure("secrets: [env:SHOP_SECRET]", "secrets: [env:OTHER_SECRET, env:SHOP_SECRET]")
    program.send_signal(signal.SIGHUP)
    await asyncio.sleep(1.5)
    n = stage.load.number()
    new = await stage.load.post(n, order(n), headers=signed(order(n), id=stage.load.id_of(n), secret=OTHER_SECRET))
    old = await stage.load.send()
    stage.demand((new.said, old) == (Said.OK, Said.OK), f"both are taken: {new.status}, {old}")
    used = await program.metric("sluicegate_secret_used_total")
    stage.demand(used > 0, "a metric tells which is used")
    stage.injected = 1
    refused = [sent for sent in stage.sent() if sent.said is Said.REFUSED]
    stage.demand(not refused, f"nobody was refused: {len(refused)}")
    await stage.recovered()


@fault(45, "slowloris: 500 connections that send a byte now and then, in head and body", Plan(rate=40))
async def slowloris(stage: Stage) -> None:
    """Compared, in turns, with as many of the same connections to somebody who does nothing.

    So what the attacker and the machine cost is in both figures, and only what the program does is between them.
    """

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            await reader.read(-1)
        writer.close()

    nobody = await asyncio.start_server(listen, "127.0.0.1", stage.spare[0])
    apart: list[float] = []
    during: list[float] = []
    for _ in range(3):
        apart.append(await latency_beside(stage, stage.spare[0]))
        during.append(await latency_beside(stage, stage.gateway.port))
        stage.injected += ATTACKERS
    nobody.close()
    without, with_it = sorted(apart)[1], sorted(during)[1]
    told = f"p95 of the others {without * 1000:.0f} → {with_it * 1000:.0f} ms"
    stage.demand(with_it < max(2 * without, without + 0.02), told)
    stage.note = told
    await stage.recovered()


async def latency_beside(stage: Stage, port: int) -> float:
    """p95 while they dawdle at this port."""
    lines = [asyncio.create_task(dawdle(port, in_body=n % 2 == 0)) for n in range(ATTACKERS)]
    await asyncio.sleep(1)
    found = await latency(stage)
    for line in lines:
        line.cancel()
    await asyncio.gather(*lines, return_exceptions=True)
    return found


async def latency(stage: Stage, seconds: float = 3) -> float:
    """p95 of the orders that come in meanwhile."""
    began = time.time()
    await asyncio.sleep(seconds)
    took = sorted(seconds for at, seconds in stage.load.took if at >= began)
    return took[int(len(took) * 0.95)] if took else float("inf")


async def dawdle(port: int, *, in_body: bool) -> None:
    with suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"POST /hooks/shop HTTP/1.1\r\nhost: here\r\n")
            if in_body:
                writer.write(b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{")
            while True:
                writer.write(b" " if in_body else b"x-slow: 1\r\n")
                await writer.drain()
                await asyncio.sleep(1)
        finally:
            writer.close()


@fault(46, "a flood of bad signatures")
async def flood(stage: Stage) -> None:
    said_before, until = stage.gateway.log.stat().st_size, time.monotonic() + 6
    statuses: dict[int, int] = {}
    body = order(1)

    async def stranger(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < until:
            headers = signed(body, id="msg_stranger", secret=OTHER_SECRET)
            async with session.post(f"{stage.gateway.address}/hooks/shop", data=body, headers=headers) as answer:
                await answer.read()
                statuses[answer.status] = statuses.get(answer.status, 0) + 1

    began = time.time()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=32)) as session:
        await asyncio.gather(*(stranger(session) for _ in range(16)))
    stage.injected = sum(statuses.values())
    stage.demand(set(statuses) == {401}, f"each is a 401: {statuses}")
    taken = [seconds for at, seconds in stage.load.took if at >= began]
    stage.demand(len(taken) > 100, f"whoever is proven is served: {len(taken)} in 6 s")
    logged = stage.gateway.log.stat().st_size - said_before
    stage.demand(logged < 200_000, f"the log is not flooded: {logged} bytes")
    stage.note = f"{stage.injected / 6:.0f}/s refused; {logged} bytes of log"
    await stage.recovered()


@fault(47, "the collector of traces is away, then a black hole", Plan(
    observability='observability: {otlp: "http://127.0.0.1:SPARE1", sample: 1.0}', dispatchers=1,
))  # fmt: skip
async def no_collector(stage: Stage) -> None:
    """Nobody listens; then somebody does and says nothing."""
    before = stage.memory(stage.programs)
    await asyncio.sleep(3)

    async def say_nothing(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass

    server = await asyncio.start_server(say_nothing, "127.0.0.1", stage.spare[0])
    stage.injected = 2
    try:
        await asyncio.sleep(5)
        await stage.recovered(at_most=2)
    finally:
        server.close()
    growth = stage.memory(stage.programs) - before
    stage.demand(growth < 60 * 2**20, f"what it may keep is bounded, and grew by {growth >> 20} MiB")


@fault(48, "nobody reads what the program logs: its standard output is full", Plan(dispatchers=1))
async def nobody_reads(stage: Stage) -> None:
    """Refusals are told sparingly, so they find room; what is said of many dead letters does not, and is counted."""
    programs, pipes = [stage.gateway, stage.dispatcher], [full_pipe(), full_pipe()]
    for program, (_, writing) in zip(programs, pipes, strict=True):
        program.output = writing
        stage.injected += 1
        await program.again()
        await program.ready()
    body = order(1)
    for n in range(300):
        await stage.load.post(stage.load.number(), body, headers=signed(body, id=f"msg_{n}", secret=OTHER_SECRET))
    await stage.recovered(at_most=2)
    await stage.partners.feel(KEEPER, Mood(status=400))
    await owe(stage, MANY)

    async def dropped() -> float:
        return await stage.dispatcher.metric("sluicegate_log_lines_dropped_total")

    await stage.until(dropped, 120, "lines that find no room are dropped and counted")
    await stage.recovered(at_most=2, without={KEEPER})
    await stage.until(lambda: nothing_waits(stage, KEEPER), 120, "all of them are dead letters")
    stage.note = f"{await dropped():.0f} lines dropped and counted"
    await stage.partners.feel(KEEPER, WELL)
    for program, pipe in zip(programs, pipes, strict=True):
        program.output = None
        await program.again()
        for end in pipe:
            os.close(end)
        await program.ready()
    await stage.recovered()


async def nothing_waits(stage: Stage, name: str) -> bool:
    return name not in await stage.waiting()


def full_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    return reading, writing


@fault(49, "the loop of a dispatcher hangs for two seconds")
async def hangs(stage: Stage) -> None:
    program = stage.dispatcher
    await program.again("dispatch.answered=sleep(2)@30")
    await program.ready()
    taken_over = await sum_of(stage, 'sluicegate_takeovers_total{careful="true"}')
    async with stage.disturb("hang", aftermath=1):
        await asyncio.sleep(6)
    stage.demand(not program.deaths, "it is not ended for that")
    lost = await sum_of(stage, 'sluicegate_takeovers_total{careful="true"}') - taken_over
    stage.demand(lost == 0, f"no lease is lost for that: {lost:.0f} lanes taken over")
    await stage.recovered()


@fault("49b", "the loop of a dispatcher hangs for ever")
async def hangs_for_ever(stage: Stage) -> None:
    program = stage.dispatcher
    await program.again("dispatch.answered=sleep(600)@30")
    async with stage.disturb("hang", aftermath=5):
        status = await program.dies(within=90)
    stage.demand(status == 70, f"the watchdog ends it with 70, not {status}")
    await stage.recovered()


async def sum_of(stage: Stage, sample: str) -> float:
    return sum([await program.metric(sample) for program in stage.dispatchers])
