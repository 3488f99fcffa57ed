"""One fault's stage: a database of its own, gateways, dispatchers, partners, senders and whoever watches."""

import asyncio
import base64
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import asyncpg
from cryptography.hazmat.primitives.serialization import Encoding

from chaos.certificates import authority
from chaos.checker import Evidence, Verdict, check, doubled
from chaos.ledger import Disturbance, Ledger, Sample, Sent, lines
from chaos.load import CANARY, OTHER_SECRET, SECRET, Load
from chaos.partner import Partners
from chaos.postgres import Postgres
from chaos.program import Program, free_port
from chaos.proxy import Proxy
from chaos.sampler import AWAY, Sampler, held_by, stored, waiting
from dead_letter.tokens import Role, Tokens
from outbox.database import Database

ENVIRON = {
    "SHOP_SECRET": SECRET,
    "OTHER_SECRET": OTHER_SECRET,
    "OUT_SECRET": "whsec_" + base64.b64encode(b"out-secret-of-32-bytes-000000000").decode(),
    "KEY": "key-of-digests-of-at-least-32-bytes",
}
KEEPER, FORGETFUL, IN_ORDER = "keeper", "forgetful", "line"
NAMES = frozenset({KEEPER, FORGETFUL, IN_ORDER})

CONFIGURATION = """
serve: {listen: "127.0.0.1:PORT"}
database: DSN
key: env:KEY
sources:
  shop: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order], body: 64KiBMORE}
SOURCES
policies:
  order:
    version: 1
    purpose: proof that it survives
    match: {kind: order}
    type: shop.order.{status}
    subject: lot/{lot}
    keep:
      id:     {from: id, type: int, min: 1}
      lot:    {from: lot, type: int, min: 0}
      status: {from: status, type: enum, of: [paid, sent, lost]}
routes:
  all:      {when: {type: shop.order.*}, to: [keeper, forgetful]}
  in-order: {when: {type: shop.order.*}, to: [line], order: subject}
ROUTES
destinations:
  keeper:    {connector: http, url: "PARTNER/keeper", MANNERS}
  forgetful: {connector: http, url: "PARTNER/forgetful", MANNERS}
  line:      {connector: http, url: "PARTNER/line", MANNERS}
DESTINATIONS
SYSTEMS
OBSERVABILITY
"""
MANNERS = "secret: env:OUT_SECRET, allow: [127.0.0.1/32], timeout: 3s, retry: {first: 100ms, cap: 1s, give_up: 10m}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a fault needs on its stage."""

    rate: float = 20.0  # orders a second, each with three deliveries
    gateways: int = 1
    dispatchers: int = 2
    wholes: int = 0  # programs that are both, so that what they store they deliver without reading it
    proxied: tuple[str, ...] = ()  # programs whose names begin so reach Postgres through a proxy, `stage.line`
    tmpfs: int = 0  # MiB of a file system of its own for a Postgres of its own
    standby: bool = False  # a Postgres of its own with a synchronous standby: `stage.postgres` is a Pair
    partners_proxied: bool = False  # and the partners through another, `stage.partners_line`
    failpoints: Mapping[str, str] = field(default_factory=dict)  # by program, in its first life
    manners: str = MANNERS
    more: str = ""  # further settings of the source
    sources: str = ""
    routes: str = ""
    destinations: str = ""
    systems: str = ""
    observability: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a fault's row tells."""

    injected: int
    recovered: float | None  # seconds; None: nothing was down
    verdict: Verdict
    note: str


class Stage:
    """Set up by `on`; a fault does its deed between that and `played`."""

    def __init__(self, folder: Path, postgres: Postgres, database: str, plan: Plan, seed: int) -> None:
        self.folder = folder
        self.postgres = postgres
        self.database = database
        self.plan = plan
        self.seed = seed
        self.dsn = postgres.dsn(database)  # the harness's own, past any proxy
        self.line = Proxy(postgres.connect)
        self.partners = Partners(folder / "partners", keeps_keys={KEEPER, IN_ORDER}, others={FORGETFUL})
        self.partners_line = Proxy(lambda: asyncio.open_connection("127.0.0.1", self.partners.port))
        self.gateways: list[Program] = []
        self.dispatchers: list[Program] = []
        self.wholes: list[Program] = []
        self.injected = 0
        self.note = ""
        self.undelivered: set[str] = set()  # where what waits may go on waiting, at the end
        self.replayed: set[tuple[str, str]] = set()
        self.environ = dict(ENVIRON)
        self.spare = [free_port() for _ in range(4)]  # where nobody listens until a fault does
        self.authority = authority()  # whose certificates a destination can be told to trust
        (folder / "ca.pem").write_bytes(self.authority[1].public_bytes(Encoding.PEM))
        self._broken: list[str] = []
        self._recovered: list[float] = []
        self._disturbances = Ledger(folder / "disturbances.jsonl")
        self.token = ""

    # ── its life ─────────────────────────────────────────────────────────────────────────────────

    @classmethod
    @asynccontextmanager
    async def on(cls, folder: Path, postgres: Postgres, plan: Plan, *, seed: int) -> AsyncIterator["Stage"]:
        """Everybody is ready, and orders come in."""
        folder.mkdir(parents=True, exist_ok=True)
        database = await postgres.create()
        stage = cls(folder, postgres, database, plan, seed)
        try:
            await stage._set_up()
            yield stage
        finally:
            await stage._clear_away()

    async def _set_up(self) -> None:
        plan = self.plan
        await self.partners.start()
        await self.line.start()
        await self.partners_line.start()
        self.gateways = [self.program(f"gateway-{n + 1}", "gateway") for n in range(plan.gateways)]
        self.dispatchers = [self.program(f"dispatcher-{n + 1}", "dispatcher") for n in range(plan.dispatchers)]
        self.wholes = [self.program(f"whole-{n + 1}", "all") for n in range(plan.wholes)]
        for program in self.programs:
            program.start(plan.failpoints.get(program.name, ""))
        await asyncio.gather(*(program.ready() for program in self.programs))
        for program in self.programs:
            program.supervise()
        self.token = await self._make_a_token()
        doors = [program.address for program in (*self.gateways, *self.wholes)]
        self.load = Load(self.folder / "sent.jsonl", doors, seed=self.seed)
        self.sampler = Sampler(
            self.folder / "samples.jsonl",
            dsn=self.dsn,
            processes=lambda: [(program.name, program.pid) for program in self.programs if program.alive],
            told=self._told,
        )
        self.sampler.start()
        self.load.start(plan.rate)
        await asyncio.sleep(1)

    def program(self, name: str, role: str) -> Program:
        text = CONFIGURATION
        for word, value in self._settings(name).items():
            text = text.replace(word, value)
        return Program(self.folder, name, role, text, self.environ)

    def _settings(self, name: str) -> dict[str, str]:
        plan = self.plan
        partners = self.partners_line.port if plan.partners_proxied else self.partners.port
        return {
            "DSN": self.postgres.dsn(self.database, through=self.line if name.startswith(plan.proxied) else None),
            "PARTNER": f"http://127.0.0.1:{partners}/{name}",  # so that a partner can tell who sent it
            "MANNERS": plan.manners,
            "MORE": plan.more,
            "SOURCES": plan.sources,
            "DESTINATIONS": plan.destinations.replace("MANNERS", plan.manners),
            "OBSERVABILITY": plan.observability,
            "ROUTES": plan.routes,
            "SYSTEMS": plan.systems,
            "AUTHORITY": str(self.folder / "ca.pem"),
            **{f"SPARE{n}": str(port) for n, port in enumerate(self.spare, start=1)},
        }

    async def _make_a_token(self) -> str:
        database = await Database.connect(self.dsn, size=1)
        try:
            return await Tokens(database).create("chaos", Role.OPERATOR, by="chaos")
        finally:
            await database.close()

    async def _clear_away(self) -> None:
        with suppress(AttributeError):
            await self.load.end(0)
        with suppress(AttributeError, OSError):
            await self.sampler.stop()
        await asyncio.gather(*(program.end() for program in self.programs))
        self.partners.stop()
        await self.line.close()
        await self.partners_line.close()
        with suppress(OSError):
            self._disturbances.close()
        await self.postgres.drop(self.database)

    @property
    def programs(self) -> list[Program]:
        return [*self.gateways, *self.dispatchers, *self.wholes]

    @property
    def gateway(self) -> Program:
        return self.gateways[0]

    @property
    def dispatcher(self) -> Program:
        return self.dispatchers[0]

    # ── what a fault does ────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def disturb(self, name: str, *, aftermath: float = 0.0, struck: Program | None = None) -> AsyncIterator[None]:
        """What is in flight during the block, and in the aftermath, may be sent again; of the one that was `struck`."""
        self.injected += 1
        began = time.time()
        try:
            yield
        finally:
            ended, who = time.time() + aftermath, struck.name if struck else ""
            self._disturbances.add(Disturbance(name=name, began=began, ended=ended, struck=who))

    def demand(self, holds: object, what: str) -> None:
        """The row's own rule; a run goes on after it is broken, and the row says so."""
        if not holds:
            self._broken.append(what)

    async def recovered(
        self, *, without: Collection[str] = (), at_most: float | None = None, within: float = 60
    ) -> float:
        """Seconds until an order that is posted now is taken and has arrived everywhere; demanded `at_most` so many."""
        began = time.monotonic()
        n = self.load.number()
        sending = asyncio.create_task(self.load.send(n))
        try:
            async with asyncio.timeout(within):
                await asyncio.shield(sending)
                for name in sorted(self.partners.names - set(without)):
                    while not await self.partners.has(name, n):
                        await asyncio.sleep(0.02)
        except TimeoutError:
            self.demand(False, f"nothing went through within {within:g} s after it")  # noqa: FBT003
        took = time.monotonic() - began
        self._recovered.append(took)
        if at_most is not None:
            self.demand(self.in_time(took, at_most), f"work again within {at_most:g} s, not {took:.1f}")
        return took

    def in_time(self, took: float, seconds: float) -> bool:
        """A bound on time is for a machine that has nothing else to do, and stretched on one that has."""
        return took <= seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))

    async def until(self, probe: Callable[[], Awaitable[object]], within: float, what: str) -> bool:
        """Whether it came about; demanded."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            with suppress(*AWAY, aiohttp.ClientError):
                if await probe():
                    return True
            await asyncio.sleep(0.05)
        self.demand(False, f"{what} within {within:g} s")  # noqa: FBT003
        return False

    def sent(self) -> list[Sent]:
        return lines(self.folder / "sent.jsonl", Sent)

    async def dead_letters(self) -> list[dict[str, str]]:
        connection = await asyncpg.connect(self.dsn, timeout=5)
        try:
            rows = await connection.fetch(
                "SELECT event_id::text, cause, reason FROM sluicegate.dead_letters ORDER BY died_at"
            )
        finally:
            await connection.close(timeout=2)
        return [dict(row) for row in rows]

    async def destination(self, name: str) -> dict[str, float]:
        """Whether it is held, and for how many hours it is left alone."""
        connection = await asyncpg.connect(self.dsn, timeout=5)
        try:
            row = await connection.fetchrow(
                """
                SELECT coalesce(held_until > clock_timestamp(), false)::int AS held,
                       coalesce(extract(epoch FROM not_before - clock_timestamp()) / 3600, 0)::float8 AS not_before_hours
                  FROM sluicegate.destinations
                 WHERE name = $1
                """,
                name,
            )
        finally:
            await connection.close(timeout=2)
        return dict(row) if row else {}

    async def burned(self, names: Collection[str]) -> int:
        """Tries that count against what waits there."""
        connection = await asyncpg.connect(self.dsn, timeout=5)
        try:
            found = await connection.fetchval(
                """
                SELECT coalesce(sum(p.attempts - p.spared), 0)
                  FROM sluicegate.pending AS p
                  JOIN sluicegate.lanes AS l USING (lane)
                  JOIN sluicegate.destinations AS d ON d.id = l.destination
                 WHERE d.name = ANY ($1)
                """,
                sorted(names),
            )
        finally:
            await connection.close(timeout=2)
        return int(found)

    async def metric(self, sample: str) -> float:
        """Of all dispatchers together."""
        return sum([await program.metric(sample) for program in (*self.dispatchers, *self.wholes)])

    def memory(self, programs: Sequence[Program]) -> int:
        """Bytes of the one that has most."""
        return max(held.rss for program in programs if (held := held_by(program.name, program.pid)))

    def sent_again(self) -> int:
        """How many deliveries came again though they had been taken."""
        return len(doubled(Evidence(sent=[], receipts=self.partners.receipts(), stored=[])))

    async def waiting(self) -> dict[str, int]:
        return await waiting(self.dsn)

    async def api(self, method: str, path: str, body: object = None) -> tuple[int, dict[str, object]]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as session:
            headers = {"Authorization": f"Bearer {self.token}"}
            url = f"{self.gateway.address}/api/v1{path}"
            async with session.request(method, url, json=body, headers=headers) as answer:
                return answer.status, await answer.json(content_type=None)

    async def _told(self) -> bool | None:
        try:
            status, told = await self.api("GET", "/invariants")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None
        return bool(told["balanced"]) if status == 200 else None

    # ── what came of it ──────────────────────────────────────────────────────────────────────────

    async def played(self, within: float = 90) -> Played:
        """Let everybody finish, stop the program as an operator would, and compare."""
        await self.load.end()
        await self.postgres.back()
        await self.until(self.is_drained, within, "everything that waits has been delivered")
        await asyncio.gather(*(program.ready() for program in self.programs))
        await self.sampler.sample()
        await self.sampler.stop()
        statuses = await asyncio.gather(*(program.stop() for program in self.programs))
        self.demand(not any(statuses), f"SIGTERM at the end: statuses {statuses}")
        verdict = check(await self.evidence())
        recovered = max(self._recovered, default=None)
        return Played(injected=self.injected, recovered=recovered, verdict=verdict, note=self.note)

    async def is_drained(self) -> bool:
        left = await self.waiting()
        return not set(left) - self.undelivered

    async def evidence(self) -> Evidence:
        return Evidence(
            sent=self.sent(),
            receipts=self.partners.receipts(),
            stored=await stored(self.dsn),
            owed=NAMES,
            keeps_keys=frozenset({KEEPER, IN_ORDER}),
            in_order=frozenset({IN_ORDER}),
            disturbances=lines(self.folder / "disturbances.jsonl", Disturbance),
            samples=lines(self.folder / "samples.jsonl", Sample),
            finals=self.sampler.finals,
            replayed=frozenset(self.replayed),
            leaked=[program.name for program in self.programs if CANARY in program.said()],
            unaccounted=self._broken,
        )

    def keep(self, place: Path) -> None:
        """Everything that was written down, for whoever has to find out."""
        shutil.copytree(self.folder, place, dirs_exist_ok=True)
