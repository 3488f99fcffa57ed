"""What the program leans on outside: certificates, names, keys of an issuer, a blocking partner; and people at work meanwhile."""

import asyncio
import json
import ssl
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

import asyncpg
import jwt
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from chaos.certificates import DAY, certificate, key_pair
from chaos.faults import fault
from chaos.ledger import Said, Sent
from chaos.load import order, signed
from chaos.partner import WELL, Mood
from chaos.stage import KEEPER, Plan, Stage

TLS = {"expired": 1, "wrong-host": 2, "self-signed": 3, "old-tls": 4}
BACKLOG = 1_000_000


def aside(names: list[str]) -> str:
    """A route of its own for orders that are lost, so that a destination that is down from the start is owed something."""
    return f"  aside: {{when: {{type: shop.order.lost}}, to: [{', '.join(names)}]}}"


async def send_aside(stage: Stage) -> Sent:
    n = stage.load.number()
    body = order(n, status="lost")
    return await stage.load.post(n, body, headers=signed(body, id=stage.load.id_of(n)))


@fault(
    25,
    "TLS: expired, of another host, signed by nobody, of 1.1",
    Plan(
        routes=aside(list(TLS)),
        destinations="\n".join(
            f'  {name}: {{connector: http, url: "https://127.0.0.1:SPARE{n}/", ca: file:AUTHORITY, MANNERS}}'
            for name, n in TLS.items()
        ),
    ),
)
async def bad_certificates(stage: Stage) -> None:
    """Held after a second look, with one alarm, and no try is burned.

    A server of TLS 1.1 resets the connection, which may be anything: its breaker opens, with one alarm, and it is left
    alone for longer each time.
    """
    servers = []
    served: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(await reader.read(10))
        writer.close()

    for name, n in TLS.items():
        servers.append(await asyncio.start_server(serve, "127.0.0.1", stage.spare[n - 1], ssl=context(name, stage)))
        stage.injected += 1
    for _ in range(3):
        stage.demand((await send_aside(stage)).said is Said.OK, "it is accepted")

    held = set(TLS) - {"old-tls"}

    async def are_held() -> bool:
        return all([(await stage.destination(name))["held"] for name in held])

    await stage.until(are_held, 25, "each is held")
    stage.undelivered |= set(TLS)
    for name in TLS:
        alarms = alarms_about(stage, name, "destination.held" if name in held else "breaker.opened")
        stage.demand(alarms == 1, f"one alarm tells of {name}, not {alarms}")
    stage.demand(not await stage.burned(held), "no try is burned")
    await stage.recovered()
    for server in servers:
        server.close()
    stage.demand(not [piece for piece in served if piece], "nothing was sent to any of them")
    stage.demand(not await stage.dead_letters(), "none is given up")


def alarms_about(stage: Stage, destination: str, event: str) -> int:
    return sum(
        f'"{event}"' in line and f'"{destination}"' in line for d in stage.dispatchers for line in d.said().splitlines()
    )


def context(name: str, stage: Stage) -> ssl.SSLContext:
    """A server's, with what is wrong with it."""
    now, place = datetime.now(UTC), stage.folder / "tls"
    place.mkdir(exist_ok=True)
    authority, issued = stage.authority
    key = key_pair()
    leaf = certificate(
        "another.example" if name == "wrong-host" else "127.0.0.1",
        key,
        key if name == "self-signed" else authority,
        ends=now - DAY if name == "expired" else now + DAY,
        issuer=None if name == "self-signed" else issued,
    )
    path = place / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + leaf.public_bytes(serialization.Encoding.PEM)
    )
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(path)
    if name == "old-tls":
        made.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            made.minimum_version, made.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    return made


@fault(
    27,
    "a name that does not resolve, and one that leads inside",
    Plan(
        routes=aside(["nowhere", "inside"]),
        destinations="""  nowhere: {connector: http, url: "https://nowhere.invalid/", MANNERS}
  inside: {connector: http, url: "https://localhost:SPARE1/", secret: env:OUT_SECRET, retry: {first: 100ms, cap: 1s, give_up: 10m}}""",
    ),
)
async def names(stage: Stage) -> None:
    reached: list[object] = []
    server = await asyncio.start_server(
        lambda reader, writer: reached.append((reader, writer)), "127.0.0.1", stage.spare[0]
    )
    stage.demand((await send_aside(stage)).said is Said.OK, "it is accepted")
    stage.injected = 2

    async def is_held() -> bool:
        return bool((await stage.destination("inside"))["held"])

    await stage.until(is_held, 25, "the one that leads inside is held")
    server.close()
    stage.undelivered |= {"nowhere", "inside"}
    stage.demand(not reached, "an address inside that is not allowed is never connected to")
    stage.demand(not (await stage.destination("nowhere"))["held"], "a name may resolve again: that is no hold")
    stage.demand(not await stage.dead_letters(), "none is given up")
    await stage.recovered(at_most=2)


@fault(32, f"a backlog of {BACKLOG:,}", Plan(rate=10))
async def backlog(stage: Stage) -> None:
    """For a destination that is held; the others must not notice."""
    await stage.api("POST", f"/destinations/{KEEPER}/hold", {"reason": "a backlog is made"})
    before = stage.memory(stage.programs)
    await owe(stage, BACKLOG)
    stage.injected = BACKLOG
    took = [await stage.recovered(without={KEEPER}) for _ in range(10)]
    growth = stage.memory(stage.programs) - before
    stage.demand(stage.in_time(sorted(took)[5], 1), f"the others do not notice: {sorted(took)[5]:.2f} s")
    stage.demand(growth < 40 * 2**20, f"memory does not depend on it: {growth >> 20} MiB")
    stage.undelivered.add(KEEPER)
    stage.note = f"others in {sorted(took)[5]:.2f} s, {growth / 2**20:+.0f} MiB"


async def owe(stage: Stage, deliveries: int) -> None:
    """To the keeper, as many as that at once, past the door."""
    connection = await asyncpg.connect(stage.dsn, command_timeout=300)
    try:
        await connection.execute("SET search_path = sluicegate")
        await connection.execute(
            f"""
            WITH made AS (
                INSERT INTO events (id, source, type, time, received_at, policy, policy_version, digest, owed, data)
                SELECT (left(event_floor(clock_timestamp())::text, 13) || '-7' || substr(md5(n::text), 1, 3)
                        || '-8' || substr(md5(n::text), 4, 3) || '-' || lpad(to_hex(n), 12, '0'))::uuid,
                       'shop', 'shop.order.paid', now(), now(), 'order', 1, gen_random_uuid(),
                       ARRAY[(SELECT id FROM destinations WHERE name = '{KEEPER}')], '{{}}'
                  FROM generate_series(1, {deliveries}) AS n
                RETURNING id, owed
            ), owing AS (
                INSERT INTO pending (event_id, lane, due_at, owed_since)
                SELECT id, (SELECT min(lane) FROM lanes WHERE destination = made.owed[1]), clock_timestamp(), clock_timestamp()
                  FROM made
            )
            INSERT INTO tally (day, what, destination, n)
            SELECT event_day(id), 1, 0, count(*) FROM made GROUP BY 1
            UNION ALL
            SELECT event_day(id), 2, owed[1], count(*) FROM made GROUP BY 1, 3
            """
        )
    finally:
        await connection.close()


TROUBLES = ("html", "slow", "rotated", "made-up")
ASKS_AGAIN = 60.0  # seconds after it asked for the keys last, when somebody presents one that it does not know


@fault(
    41,
    "an issuer's keys: away, slow, HTML, rotated, made up",
    Plan(
        dispatchers=1,
        sources="\n".join(
            f'  {trouble}: {{scheme: jwt, issuer: us, audience: them, jwks: "http://127.0.0.1:SPARE1/{n}", allow: [127.0.0.1/32], accepts: [order]}}'
            for n, trouble in enumerate(TROUBLES)
        ),
    ),
)
async def issuer(stage: Stage) -> None:
    """Each trouble has an issuer of its own, and meets the program at the moment when it asks for the keys again."""
    keys = {name: key_pair() for name in ("one", "two", "nobody's")}
    asked = dict.fromkeys(TROUBLES, 0)
    troubled = False

    async def answer(request: web.Request) -> web.Response:
        trouble = TROUBLES[int(request.match_info["n"])]
        asked[trouble] += 1
        if troubled and trouble == "slow":
            await asyncio.sleep(10)
        if troubled and trouble == "html":
            return web.Response(text="<html>", content_type="text/html")
        published = "two" if troubled and trouble == "rotated" else "one"
        return web.json_response({"keys": [jwk(published, keys[published])]})

    async def post(trouble: str, kid: str) -> int | None:
        n = stage.load.number()
        stage.injected += 1
        now = int(time.time())
        claims = {"iss": "us", "aud": "them", "iat": now, "exp": now + 60, "jti": f"token-{n}"}
        token = jwt.encode(claims, keys[kid], algorithm="ES256", headers={"kid": kid})
        headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        return (await stage.load.post(n, order(n), headers=headers, path=f"/hooks/{trouble}")).status

    for trouble in TROUBLES:
        away = await post(trouble, "one")
        stage.demand(away == 503, f"without keys nobody is taken, and nobody told that they are wrong: {away}")
    application = web.Application()
    application.router.add_get("/{n}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", stage.spare[0]).start()
    try:
        await asyncio.sleep(6)
        for trouble in TROUBLES:
            known = await post(trouble, "one")
            stage.demand(known == 202, f"with its keys it is taken: {known}")
        await asyncio.sleep(ASKS_AGAIN + 1)
        troubled = True
        for trouble in ("html", "slow"):
            told = await post(trouble, "nobody's")
            stage.demand(told == 503, f"{trouble}: who is not known cannot be judged: {told}")
            stage.demand(asked[trouble] == 2, f"{trouble}: the keys are asked for again")
            again = await post(trouble, "one")
            stage.demand(again == 202, f"{trouble}: what is known counts on: {again}")
        new, old = await post("rotated", "two"), await post("rotated", "one")
        stage.demand((new, old) == (202, 401), f"the new key counts, and the old one does not any more: {new}, {old}")
        made_up = {await post("made-up", "nobody's") for _ in range(20)}
        stage.demand(made_up == {401}, f"a key that is made up is never taken: {made_up}")
        stage.demand(asked["made-up"] == 2, f"and makes us ask once a minute, not {asked['made-up'] - 1} times")
    finally:
        await runner.cleanup()
    await stage.recovered()


def jwk(name: str, key: ec.EllipticCurvePrivateKey) -> dict[str, object]:
    made: dict[str, object] = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    return {**made, "kid": name, "use": "sig", "alg": "ES256"}


@fault(43, "dead letters replayed by two at once under load, and the gateway killed meanwhile", Plan(dispatchers=1))
async def replays(stage: Stage) -> None:
    """Each is sent again once, however often it was asked for and whoever was told so."""
    await stage.partners.feel(KEEPER, Mood(status=400))
    await asyncio.sleep(4)
    await stage.partners.feel(KEEPER, WELL)
    await asyncio.sleep(1)
    letters = [letter["event_id"] for letter in await stage.dead_letters()]
    stage.replayed |= {(event, KEEPER) for event in letters}
    for event in letters[:40]:
        select = {"select": {"events": [event]}, "reason": "their rule is mended"}
        both = [asyncio.create_task(replay(stage, select)) for _ in range(2)]
        if event in letters[10:12]:
            async with stage.disturb("kill"):
                stage.gateway.kill()
                await stage.gateway.dies()
            await stage.gateway.ready()
        await asyncio.gather(*both)
    await stage.gateway.ready()
    for event in {letter["event_id"] for letter in await stage.dead_letters()}:
        await replay(stage, {"select": {"events": [event]}, "reason": "their rule is mended"})
    stage.demand(not await stage.dead_letters(), "none is left")
    await stage.recovered()
    tries: dict[str, int] = {}
    for receipt in stage.partners.receipts():
        if receipt.partner == KEEPER and receipt.key.partition("/")[0] in letters:
            tries[receipt.key] = tries.get(receipt.key, 0) + 1
    stage.demand(max(tries.values()) <= 2, f"each is sent again once, not {max(tries.values()) - 1} times")
    stage.note = f"{len(letters)} dead letters"


async def replay(stage: Stage, select: Mapping[str, object]) -> None:
    with suppress(Exception):
        await stage.api("POST", "/dead-letters/replay", select)


@fault(44, "holds and releases while deliveries are in flight")
async def holds(stage: Stage) -> None:
    """And dead letters that are discarded and replayed at the same moment: each ends as one of the two says."""
    letters = await some_dead_letters(stage)
    await stage.partners.feel(KEEPER, Mood(delay=0.2))
    for _ in range(8):
        stage.injected += 1
        for deed in ("hold", "release"):
            status, _ = await stage.api("POST", f"/destinations/{KEEPER}/{deed}", {"reason": "a test of patience"})
            stage.demand(status == 200, f"{deed}: {status}")
            await asyncio.sleep(0.3)
    discarded, replayed = await discard_and_replay(stage, letters)
    await stage.partners.feel(KEEPER, WELL)
    await stage.recovered()
    stage.demand(
        discarded + replayed == len(letters), f"{len(letters)} letters: {discarded} discarded, {replayed} replayed"
    )
    connection = await asyncpg.connect(stage.dsn)
    try:
        deeds = await connection.fetchval("SELECT count(*) FROM sluicegate.audit WHERE target = $1", KEEPER)
        aside = await connection.fetchval("SELECT count(*) FROM sluicegate.discards")
    finally:
        await connection.close()
    stage.demand(deeds == 16, f"the audit has all 16 deeds, not {deeds}")
    stage.demand(aside == discarded, f"what was discarded stays so: {aside} of {discarded}")
    stage.demand(not stage.sent_again(), "nothing is sent twice")
    stage.note = f"of {len(letters)} dead letters {discarded} discarded, {replayed} replayed at the same time"


async def some_dead_letters(stage: Stage) -> list[str]:
    await stage.partners.feel(KEEPER, Mood(status=400, times=20))

    async def all_dead() -> bool:
        return len(await stage.dead_letters()) == 20

    await stage.until(all_dead, 15, "20 are dead letters")
    letters = [letter["event_id"] for letter in await stage.dead_letters()]
    stage.replayed |= {(event, KEEPER) for event in letters}
    return letters


async def discard_and_replay(stage: Stage, letters: list[str]) -> tuple[int, int]:
    """Each letter by two people at the same moment, who want different things; how many each of them got."""
    got = {"discard": 0, "replay": 0}

    async def repair(deed: str, event: str) -> None:
        select = {"select": {"events": [event]}, "reason": "a difference of opinion"}
        status, told = await stage.api("POST", f"/dead-letters/{deed}", select)
        stage.demand(status == 202, f"{deed}: {status}")
        got[deed] += int(str(told.get("count", 0)))

    for n, event in enumerate(letters):
        deeds = ("discard", "replay") if n % 2 else ("replay", "discard")
        await asyncio.gather(*(repair(deed, event) for deed in deeds))
    return got["discard"], got["replay"]


@fault(
    50,
    "an Odoo that takes a call and never answers",
    Plan(
        routes=aside(["note"]),
        systems='systems:\n  odoo: {connector: odoo, url: "http://127.0.0.1:SPARE1", database: d, user: u, key: env:KEY, allow: [127.0.0.1/32], timeout: 3s}',
        destinations='  note: {system: odoo, do: note, text: "order {data.id}", retry: {first: 100ms, cap: 1s, give_up: 10m}}',
    ),
)
async def silent_odoo(stage: Stage) -> None:
    taken: list[asyncio.StreamWriter] = []

    def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)

    server = await asyncio.start_server(take, "127.0.0.1", stage.spare[0])
    before = stage.memory(stage.dispatchers)
    for _ in range(30):
        stage.injected += 1
        stage.demand((await send_aside(stage)).said is Said.OK, "it is accepted")
    await asyncio.sleep(5)
    took = [await stage.recovered() for _ in range(5)]
    growth = stage.memory(stage.dispatchers) - before
    stage.demand(stage.in_time(sorted(took)[2], 1), f"the others do not notice: {sorted(took)[2]:.2f} s")
    stage.demand(taken, "it was called")
    stage.demand(growth < 40 * 2**20, f"threads are bounded: {growth >> 20} MiB")
    server.close()
    for writer in taken:
        writer.close()
    stage.undelivered.add("note")
