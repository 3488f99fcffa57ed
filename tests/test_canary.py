"""What no policy names is nowhere, whatever becomes of a post: each undeclared value is one of a kind, and is looked for.

The real program with its own Postgres takes posts that are full of canaries, in every place that nobody declared and in
every writing that comes to mind; they go through success, retries, dead letters, replay, refusals of every kind, a claim
check and a kill.  Then all that it left is searched: each file of its folder (heap, indexes, WAL), a dump, what it and
Postgres said, spans, metrics, the API and the command line.  A value that *is* declared has to be found by the same search.
"""

import asyncio
import base64
import json
import random
import re
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gateway.api import ROUTES as API
from sandbox.odoo import GATEWAY, OdooStandIn
from tests.program import COMMAND, Answer, Partner, Program, configuration, ended_with, partner, signed, until

SEED = 20261201
POSTS = 25  # of each kind
DECLARED = "KEPT-{:06d}"  # what a policy names, so that the search is known to find


# ── canaries ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Canaries:
    """Words that are nowhere else in the world, and in how many ways each may be written."""

    chance: random.Random
    words: list[str] = field(default_factory=list)

    def word(self) -> str:
        word = "".join(self.chance.choices("bcdfghjkmnpqrstvwxz", k=20))
        self.words.append(word)
        return word

    def value(self) -> object:
        """Somewhere in it is a new word, written in some way."""
        word = self.word()
        return self.chance.choice(
            [
                word,
                f"Maria {word} Example, born 1980",
                {"name": word},
                [word, 1, None],
                {word: True},
                base64.b64encode(f"<{word}>".encode()).decode(),
                base64.b64encode(word.encode("utf-16-le")).decode(),
                "\0".join(word),  # as UTF-16 in UTF-8 is
                word[:10] + "|" + word[10:],
                [word[:10], word[10:]],
                word[::-1],
                word.encode().hex(),
                [[[[{"deep": [word]}]]]],
                f"=CMD|{word}!A1",
                f"<script>{word}</script>",
            ]
        )

    def body(self, **declared: object) -> bytes:
        """A post with canaries everywhere beside what is declared; some escaped, some with characters of other planes."""
        names = [f"field_{n}" for n in range(self.chance.randrange(1, 12))]
        made: dict[str, object] = {name: self.value() for name in names}
        # Names that are declared, in a place that is not; and a word as a key.  Not at the top: the names there are told
        # to a privacy officer (docs/security.md).
        made["nested"] = {"id": self.value(), "status": self.value(), self.word(): 1}
        made["huge"] = f"{self.word()}" * 50
        items = [*made.items(), *declared.items()]
        self.chance.shuffle(items)
        text = json.dumps(dict(items), ensure_ascii=self.chance.random() < 0.5)
        if self.chance.random() < 0.5:
            word = self.word()
            text = text[:-1] + ', "escaped": "' + "".join(f"\\u{ord(letter):04x}" for letter in word) + '"}'
        return text.encode()


def traces(word: str) -> Iterator[bytes]:
    """How a word may stand in a file: any of these is a find."""
    plain = word.encode()
    yield plain
    yield plain[:10]
    yield plain[10:]
    yield plain[::-1]
    yield word.encode("utf-16-le")
    yield plain.hex().encode()
    yield "".join(f"\\u{ord(letter):04x}" for letter in word).encode()
    for before in range(3):  # base64 has three ways, by where it begins
        yield base64.b64encode(b"\0" * before + plain)[-(-before * 8 // 6) : -4][:20]


def found(haystack: bytes, words: list[str]) -> set[str]:
    """The words of which there is a trace; one pass for all."""
    by_trace = {trace: word for word in words for trace in traces(word)}
    lengths = sorted({len(trace) for trace in by_trace})
    seen: set[str] = set()
    for candidate in re.finditer(rb"[A-Za-z0-9+/\\]{10,}|(?:[a-z]\0){10,}", haystack):
        text = candidate[0]
        for length in lengths:
            for start in range(len(text) - length + 1):
                if word := by_trace.get(text[start : start + length]):
                    seen.add(word)
    return seen


def test_the_search_finds_a_word_in_each_of_its_writings() -> None:
    canaries = Canaries(random.Random(SEED))
    word = canaries.word()
    for written in (
        word, f"xx{word}yy", word[::-1], word[:10] + "|", "|" + word[10:], word.encode().hex(),
        base64.b64encode(f"<{word}>".encode()).decode(), base64.b64encode(f"<<{word}>".encode()).decode(),
        base64.b64encode(f"{word}".encode()).decode(), "".join(f"\\u{ord(letter):04x}" for letter in word),
    ):  # fmt: skip
        assert found(f"..\x00{written}\x00..".encode(), [word]) == {word}, written
    assert found(b"\1\2" + word.encode("utf-16-le") + b"\3", [word]) == {word}
    assert found(b"nothing of that kind " * 100, [word]) == set()


# ── the world ───────────────────────────────────────────────────────────────────────────────────────


class Collector(ThreadingHTTPServer):
    """Takes spans, and keeps their bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Collecting)
        self.bytes = b""


class _Collecting(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bytes += zlib.decompress(body, 47) if self.headers.get("content-encoding") == "gzip" else body
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """It only keeps."""


@contextmanager
def collector() -> Iterator[Collector]:
    with Collector() as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        serving.start()
        yield server
        server.shutdown()
        serving.join()


@contextmanager
def odoo(**employees: str) -> Iterator[OdooStandIn]:
    """On a loop and in a thread of its own."""
    loop = asyncio.new_event_loop()
    serving = threading.Thread(target=loop.run_forever, daemon=True)
    serving.start()
    stand_in = asyncio.run_coroutine_threadsafe(OdooStandIn.start(), loop).result(10)
    stand_in.add("hr.employee", 1, **employees)
    yield stand_in
    asyncio.run_coroutine_threadsafe(stand_in.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    serving.join()
    loop.close()


MORE = """
observability: {otlp: "COLLECTOR", sample: 1.0}
systems:
  people: {connector: odoo, url: "PEOPLE", database: production, user: gateway@hospital.example, key: env:ODOO_LOGIN, allow: [127.0.0.1/32]}
"""
SOURCES = """
  stock: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [stock], body: 64KiB}
"""
POLICY = """
  stock:
    version: 1
    purpose: test of what is kept
    type: stock.{status}
    subject: stock/{item}
    keep:
      item:   {from: item, type: code, pattern: "[A-Z]{4}-[0-9]{6}"}
      who:    {from: who, type: int}
      status: {from: status, type: enum, of: [low, gone, odd]}
      staff:  {from: staff, type: int, token: staff, optional: true}
"""
ROUTES = """
  low:  {when: {type: stock.low}, to: [shaky]}
  gone: {when: {type: stock.gone}, to: [picky, accounts]}
"""
DESTINATIONS = """
  shaky: {connector: http, url: "PARTNER/shaky", secret: env:OUT_SECRET, allow: [127.0.0.1/32], retry: {first: 20ms, cap: 100ms, give_up: 5m}}
  picky: {connector: http, url: "PARTNER/picky", secret: env:OUT_SECRET, allow: [127.0.0.1/32], retry: {first: 20ms, cap: 100ms, give_up: 5m}}
  accounts: {connector: http, url: "PARTNER/accounts", secret: env:OUT_SECRET, allow: [127.0.0.1/32], receives: workforce_pii,
    reads: {system: people, model: hr.employee, id: "{data.who}", fields: [name, work_email]}, retry: {first: 20ms, cap: 100ms, give_up: 5m}}
"""


@dataclass
class World:
    program: Program
    partner: Partner
    collector: Collector
    canaries: Canaries
    item: int = 0
    token: str = ""
    answers: bytes = b""
    metrics: bytes = b""
    refused_with: set[int] = field(default_factory=set)

    def post(self, status: str, **changes: object) -> int:
        self.item += 1
        body = self.canaries.body(item=DECLARED.format(self.item), who=1, status=status, staff=4711, **changes)
        return self.send(body)

    def send(self, body: bytes, path: str = "/hooks/stock", **changed: str) -> int:
        """With canaries in headers that nobody asked for."""
        headers = {**signed(body), "x-more": self.canaries.word(), "cookie": f"session={self.canaries.word()}"}
        headers |= {"authorization": f"Bearer {self.canaries.word()}", **changed}
        answer = self.program.call("POST", path, body, headers)
        self.answers += answer.body + repr(answer.headers).encode()
        return answer.status


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    canaries = Canaries(random.Random(SEED))
    folder = tmp_path_factory.mktemp("canary")
    person = {"name": canaries.word(), "work_email": f"{canaries.word()}@hospital.example"}
    with partner() as served, collector() as spans, odoo(**person) as people:
        more = MORE.replace("COLLECTOR", f"http://127.0.0.1:{spans.server_port}").replace("PEOPLE", people.url)
        text = configuration(
            partner=served.address, sources=SOURCES, routes=ROUTES, destinations=DESTINATIONS, more=more
        ).replace("PARTNER", served.address)
        program = Program(
            folder, text.replace("routes:\n", POLICY.lstrip("\n") + "routes:\n"), environ={"ODOO_LOGIN": GATEWAY.key}
        )
        with ended_with(program):
            program.start().ready()
            here = World(program, served, spans, canaries)
            live(here)
            yield here


def live(here: World) -> None:
    """Everything that can become of a post."""
    program, tries = here.program, dict[str, int]()
    here.token = command(here, "token", "create", "--name", "auditor", "--role", "auditor").split()[0]

    def mood(received: object) -> int:
        path, event = received.path, received.event  # type: ignore[attr-defined]
        tries[event + path] = tries.get(event + path, 0) + 1
        if path == "/shaky":  # one in five answers 500 at first
            return 500 if tries[event + path] < 2 and zlib.crc32(event.encode()) % 5 == 0 else 200
        return 422 if path == "/picky" else 200

    here.partner.mood = mood
    for _ in range(POSTS):
        assert here.post("low") == 202
        assert here.post("gone") == 202
        assert here.post("odd") == 202  # no route wants it
        refuse(here)
    delivered(here, "/shaky", POSTS)
    delivered(here, "/accounts", POSTS)
    dead = until(lambda: letters(here, POSTS), 20, "dead letters")
    command(here, "dead-letters", "replay", "--destination", "picky", "--reason", "a test")
    command(here, "dead-letters", "replay", "--event", dead[0], "--reason", "again")
    until(lambda: letters(here, POSTS), 20, "dead letters again")
    here.metrics = program.get("/metrics").body
    for _ in range(20):  # and some are under way when all of it is killed
        assert here.post("low") == 202
    program.kill()
    program.start().ready()
    delivered(here, "/shaky", POSTS + 20)


def refuse(here: World) -> None:
    """Posts that are not taken, each for another reason."""
    body = here.canaries.body(item="KEPT-000000", who=1, status="low")
    word = here.canaries.word
    refused = [
        here.send(body, **{"webhook-signature": f"v1,{word()}"}),
        here.send(body, **{"webhook-id": word()}),
        here.send(body, **{"webhook-timestamp": word()}),
        here.send(here.canaries.body(item=word(), who=1, status="low")),
        here.send(here.canaries.body(item="KEPT-000000", who=word(), status="low")),
        here.send(here.canaries.body(item="KEPT-000000", who=1, status=word())),
        here.send(here.canaries.body()),
        here.send(body[:-1] + f', "item": "{word()}"}}'.encode()),
        here.send(body[:-1]),
        here.send(f"[{json.dumps(word())}]".encode()),
        here.send(word().encode()),
        here.send(body, **{"content-type": f"text/{word()}"}),
        here.send(body, f"/hooks/{word()}"),
        here.send(body, f"/hooks/stock/{word()}"),
        here.send(body, f"/{word()}"),
        here.send(body, f"/hooks/stock?q={word()}", **{"webhook-signature": f"v1,{word()}"}),
    ]
    assert not {status for status in refused if status < 400 or status >= 500}, refused
    here.refused_with |= {*refused}


def delivered(here: World, path: str, count: int) -> None:
    until(lambda: len(here.partner.events(path)) >= count, 40, f"{count} deliveries to {path}")

    def settled() -> bool:
        items = ask(here, "/destinations").json["items"]
        return not any(item["waiting"] for item in items if item["name"] == path[1:])

    until(settled, 40, f"settlements of {path}")


def letters(here: World, count: int) -> list[str]:
    items = ask(here, "/dead-letters?limit=200&destination=picky").json["items"]
    return [item["event_id"] for item in items] if len(items) >= count else []


def ask(here: World, path: str) -> Answer:
    answer = here.program.call("GET", f"/api/v1{path}", None, {"authorization": f"Bearer {here.token}"})
    assert answer.status == 200, (path, answer)
    return answer


def command(here: World, *words: str) -> str:
    return run(here, *words, "--config", str(here.program.path))


def beside(here: World, *words: str) -> str:
    """One of Postgres' own programs."""
    return run(here, "postgres", "--config", str(here.program.path), "--", *words)


def run(here: World, *words: str) -> str:
    told = subprocess.run(
        [*COMMAND, *words], env=here.program.environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


# ── where it is looked for ──────────────────────────────────────────────────────────────────────────


def files(here: World) -> bytes:
    """Every file that the program wrote: heap, indexes, WAL, and all else; once it has stopped, so that it is all there."""
    assert here.program.stop() == 0
    written = [path for path in here.program.folder.rglob("*") if path.is_file() and path != here.program.path]
    return b"\n".join(path.read_bytes() for path in written)


def api(here: World) -> bytes:
    """All that it answers to who may read everything, in as many pages as there are."""
    told = b""
    for path in [route.path for route in API if route.method == "GET" and "{" not in route.path]:
        cursor: str | None = ""
        while cursor is not None:
            answer = ask(here, path + cursor)
            told += answer.body
            following = answer.json.get("next") if isinstance(answer.json, dict) else None
            cursor = f"?cursor={following}" if following else None
    events = ask(here, "/events?limit=200").json["items"]
    return told + b"".join(ask(here, f"/events/{event['id']}").body for event in events)


def told_by_commands(here: World) -> bytes:
    event = json.loads(command(here, "events", "list", "--json"))["items"][0]["id"]
    said = [
        command(here, *words)
        for words in (
            ("events", "list"), ("events", "show", event), ("dead-letters", "list"), ("dead-letters", "causes"),
            ("dead-letters", "list", "--json"), ("sources", "list"), ("destinations", "list"),
        )
    ]  # fmt: skip
    return "".join(said).encode()


PLACES: dict[str, Callable[[World], bytes]] = {
    "a dump": lambda here: beside(here, "pg_dump", "--inserts").encode(),
    "what it and Postgres said": lambda here: here.program.output.encode(),
    "spans": lambda here: here.collector.bytes,
    "metrics": lambda here: here.metrics + here.program.get("/metrics").body,
    "its answers": lambda here: here.answers,
    "the API": api,
    "the command line": told_by_commands,
    "what went to partners that read nothing": lambda here: b"".join(
        received.body + repr(received.headers).encode()
        for received in list(here.partner.received)
        if received.path != "/accounts"
    ),
}
KEEPS_WHAT_IS_DECLARED = {"a dump", "the API", "what went to partners that read nothing"}


@pytest.mark.parametrize("place", PLACES)
def test_what_no_policy_names_is_nowhere_and_what_one_names_is_found(world: World, place: str) -> None:
    searched = PLACES[place](world)
    assert len(searched) > 1000
    assert len(world.canaries.words) > 3000
    assert found(searched, world.canaries.words) == set()
    if place in KEEPS_WHAT_IS_DECLARED:
        assert DECLARED.format(1).encode() in searched
    elif place == "spans":
        assert b"stock" in searched


def test_all_that_can_become_of_a_post_did(world: World) -> None:
    """Else the search would have looked at less than it says."""
    books = world.metrics.decode()
    assert world.refused_with >= {400, 401, 404, 415, 422}
    for sample in ("retry", "refused", "delivered"):
        assert f'outcome="{sample}"' in books
    handed_over = [received.body for received in world.partner.received if received.path == "/accounts"]
    assert handed_over
    assert all(found(body, world.canaries.words[:2]) == {*world.canaries.words[:2]} for body in handed_over)


def test_a_pseudonym_stands_for_what_it_hides(world: World) -> None:
    dump = PLACES["a dump"](world)
    assert b'"staff":"' in dump.replace(b"\\", b"")
    assert b'"staff":4711' not in dump


def test_no_file_of_the_program_holds_it_either(world: World) -> None:
    """Last, for it stops the program: heap, indexes and WAL are then on disk as they will be found."""
    searched = files(world)
    assert found(searched, world.canaries.words) == set()
    assert DECLARED.format(1).encode() in searched
