"""Senders that are hostile, broken or too many; and what a machine does around the program."""

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median

import msgspec

from chaos.faults import fault
from chaos.faults.elsewhere import owe
from chaos.ledger import Said, Sent
from chaos.load import OTHER_SECRET, SECRET, order, signed
from chaos.partner import WELL, Mood
from chaos.program import Program
from chaos.stage import KEEPER, Plan, Stage
from tests.flood import Posted, Posting

ATTACKERS = 500
FLOOD, FLOOD_LASTS = 2_000, 6  # a second, seconds
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
    new, old = await post_signed(stage, OTHER_SECRET), await post_signed(stage, SECRET)
    stage.demand((new.said, old.said) == (Said.OK, Said.OK), f"both are taken: {new.status}, {old.status}")
    stage.load.secret = OTHER_SECRET
    await asyncio.sleep(1.5)
    before = await used(program)
    await asyncio.sleep(1.5)
    new_used, old_used = [now - then for now, then in zip(await used(program), before, strict=True)]
    stage.demand(new_used and not old_used, f"a metric tells that the old one can go: {new_used:.0f}, {old_used:.0f}")
    program.reconfigure("secrets: [env:OTHER_SECRET, env:SHOP_SECRET]", "secrets: [env:OTHER_SECRET]")
    program.send_signal(signal.SIGHUP)
    await asyncio.sleep(1.5)
    refused = [sent for sent in stage.sent() if sent.said is Said.REFUSED]
    stage.demand(not refused, f"nobody was refused: {len(refused)}")
    gone = await post_signed(stage, SECRET)
    stage.demand(gone.status == 401, f"the one that went proves nothing any more: {gone.status}")
    stage.injected = 2
    await stage.recovered()


async def post_signed(stage: Stage, secret: str) -> Sent:
    n = stage.load.number()
    return await stage.load.post(n, order(n), headers=signed(order(n), id=stage.load.id_of(n), secret=secret))


async def used(program: Program) -> tuple[float, float]:
    """How often each of the two secrets proved something, the new one first."""
    first, second = [
        await program.metric(f'sluicegate_secret_used_total{{secret="{n}",source="shop"}}') for n in (0, 1)
    ]
    return first, second


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
    """2,000/s in an open loop: who is answered late comes over another connection.  Whoever is proven is served."""
    said_before, spent_before = stage.gateway.log.stat().st_size, processor_seconds(stage.gateway)
    body = order(1)
    bad = http_post(body, signed(body, id="msg_stranger", secret=OTHER_SECRET))
    posting = Posting(port=stage.gateway.port, rate=FLOOD, requests=[bad] * (FLOOD * FLOOD_LASTS))
    began = time.time()
    posted = await in_a_process_of_its_own(posting)
    stage.injected = len(posting.requests)
    stage.demand(stage.in_time(FLOOD / posted.offered, 1.1), f"{FLOOD}/s are offered, not {posted.offered:.0f}")
    stage.demand(posted.answers.keys() - {0} == {401}, f"each is answered 401, or cut off: {posted.answers}")
    meanwhile = [sent for sent in stage.sent() if began <= sent.at < began + FLOOD_LASTS]
    wanted = stage.plan.rate * FLOOD_LASTS
    stage.demand(len(meanwhile) >= 0.9 * wanted, f"{wanted:.0f} orders are posted meanwhile, not {len(meanwhile)}")
    stage.demand({sent.status for sent in meanwhile} == {202}, "whoever is proven is served, each of them")
    took = median(sent.ended - sent.at for sent in meanwhile)
    stage.demand(stage.in_time(took, 1), f"within a second, not {took:.1f}")
    logged = stage.gateway.log.stat().st_size - said_before
    stage.demand(logged < 200_000, f"the log is not flooded: {logged} bytes")
    each = (processor_seconds(stage.gateway) - spent_before) / len(posting.requests)
    stage.note = (
        f"{posted.offered:.0f}/s offered and {posted.answers.get(401, 0)} refused over {posted.connections} connections, for {each * 1e6:.0f} µs of a processor each; "
        f"the others in {took:.2f} s; {logged} bytes of log"
    )
    await stage.recovered()


def processor_seconds(program: Program) -> float:
    user, system = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def http_post(body: bytes, headers: Mapping[str, str]) -> bytes:
    lines = [
        f"{name}: {value}" for name, value in {"host": "here", "content-length": str(len(body)), **headers}.items()
    ]
    return "\r\n".join(["POST /hooks/shop HTTP/1.1", *lines, "", ""]).encode() + body


async def in_a_process_of_its_own(posting: Posting) -> Posted:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.flood", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24
    )
    answer, _ = await process.communicate(msgspec.json.encode(posting) + b"\n")
    return msgspec.json.decode(answer, type=Posted, strict=False)


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
        await stage.until(lambda: all_drop_spans(stage), 45, "each process counts the spans that it drops")
    finally:
        server.close()
    growth = stage.memory(stage.programs) - before
    stage.demand(growth < 60 * 2**20, f"what it may keep is bounded, and grew by {growth >> 20} MiB")


async def all_drop_spans(stage: Stage) -> bool:
    return all([await program.metric("sluicegate_spans_dropped_total") for program in stage.programs])


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
    taken_over = await stage.metric('sluicegate_takeovers_total{careful="true"}')
    async with stage.disturb("hang", aftermath=1):
        await asyncio.sleep(6)
    late = await program.metric("sluicegate_loop_lag_seconds_sum")
    stage.demand(late >= 1.5, f"the lag of its loop is told: {late:.1f} s")  # 2 s less the tick that it fell into
    stage.demand(not program.deaths, "it is not ended for that")
    lost = await stage.metric('sluicegate_takeovers_total{careful="true"}') - taken_over
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
