"""What is typed, and what comes back."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import click
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner, Result

from dead_letter.tokens import Role, Tokens
from gateway import cli
from gateway.authenticate import Caller, Presented, scheme_for
from gateway.config import load
from gateway.policy_versions import PolicyVersions
from gateway.show import counted, span
from outbox.database import Database
from outbox.embedded import Embedded
from outbox.event import OutcomeKind
from outbox.records import Records
from tests.rows import Rows

SLUICEGATE = str(Path(sys.executable).with_name("sluicegate"))
CONFIGURATION = """
serve: {listen: "127.0.0.1:PORT", public_url: https://gateway.example/sluicegate}
database: env:DATABASE
key: env:KEY
facilities: {north: {name: North Hospital}}
sources:
  shop: {scheme: standard-webhooks, secrets: [env:SHOP_SECRET], accepts: [order]}
  meter: {scheme: hmac, header: X-Signature, prefix: "sha256=", secrets: [env:METER_SECRET], accepts: [order]}
  supplier:
    scheme: hmac
    header: X-Signature
    encoding: base64
    algorithm: sha512
    signed: "{id}.{timestamp}.{body}"
    timestamp: X-Timestamp
    tolerance: 5m
    id: X-Delivery
    secrets: [{secret: env:OLD_SECRET, not_after: 2020-01-01T00:00:00Z}, env:METER_SECRET]
    accepts: [order]
  crm: {scheme: api-key, header: X-Api-Key, keys: [env:CRM_KEY], accepts: [order]}
  desk: {scheme: basic, user: env:KEY, secrets: [{secret: env:OLD_SECRET, not_after: 2020-01-01T00:00:00Z}, env:METER_SECRET], accepts: [order]}
  edge: {scheme: http-signature, keys: {edge-1: env:METER_SECRET}, components: ["@method", "@target-uri", content-digest], accepts: [order]}
  edge-2: {scheme: http-signature, keys: {edge-2: env:PUBLIC_KEY}, components: ["@path", content-digest], accepts: [order]}
  odoo: {scheme: odoo-native, token: env:ODOO_TOKEN, accepts: [order]}
  square: {scheme: hmac, header: X-Signature, encoding: base64, signed: "{url}{body}", secrets: [env:METER_SECRET], accepts: [order]}
  github: {scheme: github, secrets: [env:METER_SECRET], accepts: [order]}
  shopify: {scheme: shopify, secrets: [env:METER_SECRET], accepts: [order]}
  slack: {scheme: slack, secrets: [env:METER_SECRET], accepts: [order]}
  stripe: {scheme: stripe, secrets: [env:METER_SECRET], accepts: [order]}
  twilio: {scheme: twilio, secrets: [env:METER_SECRET], accepts: [order]}
  sms: {scheme: twilio, format: form, secrets: [env:METER_SECRET], accepts: [order]}
  keyed: {scheme: standard-webhooks, secrets: [env:SENDER_KEY], accepts: [order]}
  lab: {scheme: jwt, issuer: https://id.lab.example, audience: us, jwks: https://id.lab.example/keys, accepts: [order]}
policies:
  order: {version: 1, purpose: test, type: shop.order.paid, subject: "order/{id}", keep: {id: {from: id, type: int}}}
routes:
  all: {to: [ledger, picky]}
destinations:
  ledger: {connector: http, url: "http://127.0.0.1:PORT/ledger", secret: env:SHOP_SECRET, allow: [127.0.0.1/32]}
  picky: {connector: http, url: "http://127.0.0.1:PORT/picky", secret: env:SHOP_SECRET, allow: [127.0.0.1/32]}
"""
ENVIRONMENT = {
    "KEY": "key-of-at-least-32-bytes-00000000",
    "SHOP_SECRET": "whsec_c2hvcC1zZWNyZXQtb2YtMzItYnl0ZXMtMDAwMDAwMDA=",
    "METER_SECRET": "meter-secret-of-32-bytes-0000000",
    "OLD_SECRET": "older-secret-of-32-bytes-0000000",
    "SENDER_KEY": "whpk_0r0+Z02Sv1SRb1QjsKUnil6t2oqtAyhn5HHfKgbTXFs=",
    "CRM_KEY": "crm.key-of-at-least-16-bytes",
    "ODOO_TOKEN": "odoo-token-of-32-bytes-000000000",
    "PUBLIC_KEY": (
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAJrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=\n-----END PUBLIC KEY-----"
    ),
}


@dataclass
class Shell:
    """A folder with a configuration in it, and somebody who types there."""

    folder: Path
    environment: dict[str, str]

    @property
    def config(self) -> Path:
        return self.folder / "sluicegate.yaml"

    async def type(self, *words: object, config: Path | None = None, given: bytes | None = None) -> Result:
        arguments = [*map(str, words), "--config", str(config or self.config)]
        runner = CliRunner(env=self.environment)
        result = await asyncio.to_thread(runner.invoke, cli.main, arguments, input=given)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "Traceback" not in result.output
        return result

    async def say(self, *words: object, given: bytes | None = None) -> str:
        """What a command that succeeds says."""
        result = await self.type(*words, given=given)
        assert result.exit_code == 0, result.output
        return result.stdout

    async def json(self, *words: object) -> dict:
        return json.loads(await self.say(*words, "--json"))

    async def fail(self, *words: object, code: int = 1, config: Path | None = None) -> str:
        """What a command that fails says, on stderr."""
        result = await self.type(*words, config=config)
        assert result.exit_code == code, result.output
        return result.stderr


@dataclass
class Door:
    """A gateway that proves who posts and stores nothing."""

    shell: Shell
    port: int
    callers: list[tuple[str, object]] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        config = load(self.shell.config, self.shell.environment)
        source = config.sources[request.match_info["source"]]
        scheme = scheme_for(source, config.serve)
        caller = await scheme.authenticate(
            Presented(
                headers=request.headers,
                body=await request.read(),
                target=request.raw_path,
                token=request.match_info.get("token"),
                peer=ip_address("127.0.0.1"),
                at=time.time(),
            )
        )
        await scheme.close()
        self.callers.append((source.name, caller))
        if not isinstance(caller, Caller):
            return web.json_response({"title": "Not proven", "detail": "no", "status": 401}, status=401)
        duplicate = len([name for name, _ in self.callers if name == source.name]) > 1
        return web.json_response(
            {"id": "019a9f3e-71c4-7d10-a3c2-55f0f5a0b6d1", "duplicate": duplicate}, status=200 if duplicate else 202
        )


@pytest_asyncio.fixture
async def rows(database: Database) -> Rows:
    return await Rows(database).open("ledger", "picky")


@pytest.fixture
def shell(tmp_path: Path, dsn: str) -> Shell:
    shell = Shell(tmp_path, {**ENVIRONMENT, "DATABASE": dsn})
    shell.config.write_text(CONFIGURATION.replace("PORT", "9"))
    return shell


@pytest_asyncio.fixture
async def door(shell: Shell) -> AsyncIterator[Door]:
    door = Door(shell, 0)
    application = web.Application()
    application.router.add_post("/hooks/{source}", door.take)
    application.router.add_post("/hooks/{source}/{token}", door.take)
    server = TestServer(application, host="127.0.0.1")
    await server.start_server()
    assert server.port
    door.port = server.port
    shell.config.write_text(CONFIGURATION.replace("PORT", str(server.port)))
    yield door
    await server.close()


# ── every command ────────────────────────────────────────────────────────────────────────────────────


def every_command(group: click.Group = cli.main, above: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, f"{above}{name} ")
        else:
            yield above + name, command


def test_these_are_the_commands() -> None:
    assert {name for name, _ in every_command()} == {
        "serve", "check", "migrate", "postgres", "send", "demo", "events list", "events show", "dead-letters list",
        "dead-letters causes", "dead-letters show", "dead-letters replay", "dead-letters discard", "destinations list",
        "destinations hold", "destinations release", "connectors list", "config schema", "token create", "token list",
        "token revoke", "destinations reassign", "destinations discard", "sources list", "sources diagnose",
        "policy test", "policy draft", "policy diff", "policy report",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "command"), list(every_command()))
def test_every_command_takes_a_configuration_explains_itself_and_answers_in_json_if_it_shows(
    name: str, command: click.Command
) -> None:
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--config" in options
    assert command.help
    assert all(p.help for p in command.params if isinstance(p, click.Option))
    if name.endswith((" list", " show", " causes")):
        assert "--json" in options


def test_help_is_there_at_once() -> None:
    heavy = "{'pydantic', 'asyncpg', 'aiohttp', 'msgspec', 'structlog', 'asyncio', 'ruamel.yaml', 'opentelemetry'}"
    program = f"""
import sys
from gateway.cli import main
for words in ([], ['--help'], ['dead-letters', 'replay', '--help'], ['--version']):
    try:
        main(words)
    except SystemExit:
        pass
print(sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Usage: " in done.stdout


def test_serve_starts_its_postgres_before_the_rest_of_the_program_is_read() -> None:
    heavy = "{'asyncpg', 'aiohttp', 'structlog', 'prometheus_client', 'opentelemetry', 'gateway.app'}"
    program = f"""
import sys
import gateway.cli, gateway.serve
from connectors import kinds
kinds()["http"]
print(sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]"]


def test_a_configuration_with_mistakes_starts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "sluicegate.yaml"
    path.write_text("database: embedded\nroutes: {all: {to: [nowhere]}}\n")
    done = subprocess.run(
        [SLUICEGATE, "serve", "--config", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_the_roles_that_can_be_typed_are_the_roles() -> None:
    assert list(cli.ROLES) == [role.value for role in Role]


# ── events ───────────────────────────────────────────────────────────────────────────────────────────


async def test_events_are_listed_in_aligned_lines(shell: Shell, rows: Rows) -> None:
    first = await rows.event("ledger")
    second = await rows.event(type="meter.read", subject=None)
    head, newer, older = (await shell.say("events", "list")).splitlines()
    assert head.split() == ["RECEIVED", "EVENT", "TYPE", "SUBJECT", "FACILITY", "DELIVERIES"]
    assert str(second) in newer
    assert newer.endswith("unrouted")
    assert str(first) in older
    assert older.endswith("ledger waiting")
    assert head.index("TYPE") == newer.index("meter.read") == older.index("shop.order.paid")
    paged = await shell.say("events", "list", "--limit", 1)
    cursor = paged.splitlines()[-1].rpartition("--cursor ")[2]
    assert str(first) in await shell.say("events", "list", "--cursor", cursor)
    assert [item["id"] for item in (await shell.json("events", "list", "--type", "shop.*"))["items"]] == [str(first)]
    assert await shell.say("events", "list", "--to", "2020-01-01") == "No events match.\n"


async def test_the_story_of_an_event_is_told_in_order_with_its_traces(
    shell: Shell, rows: Rows, database: Database
) -> None:
    event = await rows.event("ledger", "picky", trace="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    await rows.tried(event, "ledger")
    await rows.delivered(event, "ledger")
    await rows.dead(event, "picky")
    await shell.say("dead-letters", "replay", "--event", event, "--reason", "partner mended")
    await rows.dead(event, "picky", OutcomeKind.UNKNOWN, 504)
    told = await shell.say("events", "show", event)
    story = told[told.index("accepted") :]
    happened = [
        "accepted", "0af7651916cd43dd8448eb211c80319c", "try 1: retry", "try 2: delivered",
        "try 1: refused", "replayed", "partner mended", "try 2: unknown", "dead letter",
    ]  # fmt: skip
    places = [story.index(word) for word in happened]
    assert places == sorted(places)
    assert all(re.search(rf"\b{status}\b", story) for status in (503, 200, 400, 504))
    traces = await database.fetch("SELECT trace_id FROM attempts")
    assert all(row["trace_id"].hex in told for row in traces)
    assert "id=42  total=42.50" in told
    shown = await shell.json("events", "show", event)
    assert (shown["id"], [deed["reason"] for deed in shown["deeds"]]) == (str(event), ["partner mended"])


async def test_a_delivery_that_was_tried_and_waits_is_shown_with_what_the_last_try_met(
    shell: Shell, rows: Rows
) -> None:
    event = await rows.event("ledger", "picky")
    await rows.tried(event, "ledger")
    ledger, picky = (await shell.say("events", "show", event)).split("\n\n")[1].splitlines()[1:]
    assert ledger.endswith("HTTP 503")
    assert picky.endswith("–")


async def test_an_event_that_nobody_wants_says_so(shell: Shell, rows: Rows) -> None:
    assert "No route wants it" in await shell.say("events", "show", await rows.event())


async def test_an_unknown_event_is_a_sentence_and_no_traceback(shell: Shell, rows: Rows) -> None:
    event = "019a9f3e-71c4-7d10-a3c2-55f0f5a0b6d1"
    assert f"There is no event {event}" in await shell.fail("events", "show", event)
    assert "not a valid UUID" in await shell.fail("events", "show", "nonsense", code=2)
    assert "is no time" in await shell.fail("events", "list", "--from", "yesterday", code=2)
    assert "cursor" in await shell.fail("events", "list", "--cursor", "nonsense")


async def test_a_sign_that_would_move_the_cursor_of_a_terminal_is_not_shown(shell: Shell, rows: Rows) -> None:
    await rows.event(subject="order/\x1b[2J")
    assert "\x1b" not in await shell.say("events", "list")


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────────


async def test_dead_letters_are_found_by_cause_and_shown_with_the_mend(shell: Shell, rows: Rows) -> None:
    event = await rows.letter("picky")
    await rows.letter("picky")
    assert str(event) in await shell.say("dead-letters", "list", "--destination", "picky")
    causes = await shell.say("dead-letters", "causes")
    assert "2  picky:refused:400" in causes
    assert "picky understood and said no" in causes
    shown = await shell.say("dead-letters", "show", event)
    assert all(word in shown for word in ("picky:refused:400", "picky understood and said no", "try 1: refused"))
    assert [item["count"] for item in (await shell.json("dead-letters", "causes"))["items"]] == [2]
    assert (await shell.json("dead-letters", "show", event))["items"][0]["letter"]["event_id"] == str(event)
    assert (await shell.json("dead-letters", "list"))["items"][1]["event_id"] == str(event)
    assert "no such dead letter" in await shell.fail("dead-letters", "show", event, "--destination", "ledger")


async def test_a_dry_run_says_what_would_happen_and_does_nothing(shell: Shell, rows: Rows) -> None:
    await rows.letter("picky")
    said = await shell.say("dead-letters", "replay", "--destination", "picky", "--dry-run")
    assert "Would replay 1 dead letter" in said
    assert "Nothing was changed." in said
    assert (await shell.json("dead-letters", "discard", "--facility", "north", "--dry-run"))["count"] == 1
    assert await rows.count("dead_letters") == 1
    assert "No dead letters match" in await shell.say("dead-letters", "replay", "--cause", "x", "--dry-run")


async def test_replay_and_discard_do_what_they_say_and_who_did_it_is_kept(
    shell: Shell, rows: Rows, database: Database
) -> None:
    first, second, third = [await rows.letter("picky") for _ in range(3)]
    said = await shell.say("dead-letters", "discard", "--event", first, "--event", second, "--reason", "by phone")
    assert said.startswith("Discarded 2 dead letters; in the audit as ")
    assert (await shell.json("dead-letters", "replay", "--destination", "picky", "--reason", "mended"))["count"] == 1
    assert (await rows.count("discards"), await rows.count("pending")) == (2, 1)
    assert "nothing was changed" in await shell.say("dead-letters", "replay", "--event", third, "--reason", "again")
    actors = {row["actor"] for row in await database.fetch("SELECT actor FROM audit")}
    assert all(actor.endswith(" (command line)") for actor in actors)
    assert (await Records(database).books()).balanced


async def test_a_repair_needs_a_selection_and_a_reason(shell: Shell, rows: Rows) -> None:
    await rows.letter("picky")
    for verb in ("replay", "discard"):
        assert "Name what to take" in await shell.fail("dead-letters", verb, "--reason", "r", code=2)
        assert "Name what to take" in await shell.fail("dead-letters", verb, "--dry-run", code=2)
        assert "--reason" in await shell.fail("dead-letters", verb, "--destination", "picky", code=2)
        assert "--reason" in await shell.fail("dead-letters", verb, "--destination", "picky", "--reason", " ", code=2)
        assert "--reason" in await shell.fail("dead-letters", verb, "--cause", "x", "--reason", "two\nlines", code=2)
    assert await rows.count("dead_letters") == 1


# ── destinations, connectors, tokens ─────────────────────────────────────────────────────────────────


async def test_a_destination_that_is_not_configured_any_more_says_what_becomes_of_what_it_is_owed(
    shell: Shell, rows: Rows
) -> None:
    await rows.open("forgotten", "gone", "held", "settled", partitions=False)
    await rows.event("gone", "held")
    await rows.letter("forgotten")
    await shell.say("destinations", "hold", "held", "--reason", "noon")
    found = {item["name"]: item for item in (await shell.json("destinations", "list"))["items"]}
    assert {name: (item["state"], item["reason"]) for name, item in found.items()} == {
        "forgotten": ("held", "not configured: discard its dead letters, or put it back and replay them"),
        "gone": ("held", "not configured: put it back, or reassign or discard what waits"),
        "held": ("held", "not configured: put it back, or reassign or discard what waits; and held: noon"),
        "ledger": ("flowing", None),
        "picky": ("flowing", None),
    }
    assert "put it back, or reassign or discard what waits" in await shell.say("destinations", "list")


async def test_a_destination_is_held_and_released(shell: Shell, rows: Rows) -> None:
    await rows.event("ledger")
    said = await shell.say("destinations", "hold", "ledger", "--reason", "moving house", "--until", "2099-01-01")
    assert said == "ledger is held until 2099-01-01 00:00:00Z: deliveries to it wait.\n"
    ledger, picky = (await shell.say("destinations", "list")).splitlines()[1:]
    assert ledger.split()[:4] == ["ledger", "http", "held", "1"]
    assert re.search(r"  moving house — by [^()]+ \(command line\), until 2099-01-01 00:00:00Z$", ledger)
    assert picky.split()[:4] == ["picky", "http", "flowing", "0"]
    assert (await shell.json("destinations", "list"))["items"][0]["reason"] == "moving house"
    assert "what waited goes out" in await shell.say("destinations", "release", "ledger", "--reason", "moved")
    assert "was not held" in await shell.say("destinations", "release", "ledger", "--reason", "moved")


async def test_a_destination_that_is_not_there_is_told_with_a_suggestion(shell: Shell, rows: Rows) -> None:
    assert 'did you mean "ledger"' in await shell.fail("destinations", "hold", "ledgr", "--reason", "r")
    assert "Missing option '--reason'" in await shell.fail("destinations", "hold", "ledger", code=2)
    for verb in ("list", "causes", "replay", "discard"):
        why = [] if verb in ("list", "causes") else ["--reason", "r"]
        said = await shell.fail("dead-letters", verb, "--destination", "pickle", *why)
        assert 'There is no destination "pickle"; did you mean "picky"?' in said
    assert "no destination" in await shell.fail("dead-letters", "replay", "--destination", "nowhere", "--dry-run")
    assert await shell.say("dead-letters", "list", "--destination", "picky") == "No dead letters match.\n"


async def test_a_hold_until_a_time_that_is_over_is_refused(shell: Shell, rows: Rows) -> None:
    for over in ("2020-01-01", "2020-01-01T10:00:00+02:00"):
        said = await shell.fail("destinations", "hold", "ledger", "--reason", "r", "--until", over, code=2)
        assert "--until" in said
        assert "is over" in said
    assert (await shell.json("destinations", "list"))["items"][0]["state"] == "flowing"


async def test_a_destination_that_never_ran_is_told_from_one_that_is_not_configured(
    shell: Shell, database: Database
) -> None:
    said = await shell.fail("destinations", "hold", "ledger", "--reason", "r")
    assert "No `sluicegate serve` has run with ledger" in said


async def test_a_source_is_shown_with_when_it_was_heard_and_what_is_expected(shell: Shell, database: Database) -> None:
    assert "not expected" in await shell.say("sources", "list")
    text = shell.config.read_text()
    accepts = "accepts: [order]"
    shell.config.write_text(text.replace(accepts, f"{accepts}, expect: {{every: 1h, sequence: id}}", 1))
    await database.execute(
        """
        INSERT INTO heard (source, facility, at) VALUES ('shop', 'north', '2026-11-23T10:00:00Z');
        """
    )
    await database.execute("INSERT INTO sequences VALUES ('shop', 'north', 3, 9, gen_random_uuid(), gen_random_uuid())")
    await database.execute("INSERT INTO sequence_gaps VALUES ('shop', 'north', 5, 6, '{[5,7)}', now(), true)")
    told = [line.split() for line in (await shell.say("sources", "list")).splitlines()]
    assert ["shop", "–", "heard", "2026-11-23", "10:00:00Z", "1h", "UTC", "–"] in told
    assert ["shop", "north", "not", "expected", "2026-11-23", "10:00:00Z", "–", "2", "of", "3–9"] in told
    assert (await shell.json("sources", "list"))["sequences"][0]["missing"] == 2


async def test_the_kinds_of_connector_are_listed_with_who_uses_them(shell: Shell) -> None:
    assert "http  ledger, picky" in await shell.say("connectors", "list")
    assert {"name": "odoo", "destinations": []} in (await shell.json("connectors", "list"))["items"]


async def test_a_token_stands_alone_on_the_last_line_and_is_good(shell: Shell, database: Database) -> None:
    made = await shell.type("token", "create", "--name", "night shift", "--role", "operator")
    token = made.stdout.splitlines()[-1]
    assert made.stdout == f"{token}\n"
    holder = await Tokens(database).holder(token)
    assert holder is not None
    assert (holder.name, holder.role) == ("night shift", Role.OPERATOR)
    (listed,) = (await shell.json("token", "list"))["items"]
    assert token not in await shell.say("token", "list")
    assert "Revoked" in await shell.say("token", "revoke", listed["id"])
    assert await Tokens(database).holder(token) is None
    assert "no token of this id" in await shell.fail("token", "revoke", listed["id"])
    assert "is not one of" in await shell.fail("token", "create", "--name", "x", "--role", "god", code=2)
    for name in (" ", "two\nlines", "program"):
        assert "--name" in await shell.fail("token", "create", "--name", name, "--role", "viewer", code=2)


async def test_the_schema_is_json(shell: Shell) -> None:
    assert json.loads(await shell.say("config", "schema"))["$schema"].startswith("https://json-schema.org/")


# ── check, migrate, send ─────────────────────────────────────────────────────────────────────────────


async def test_what_waits_for_a_destination_that_is_gone_is_reassigned_or_discarded(shell: Shell, rows: Rows) -> None:
    await rows.open("gone", partitions=False)
    event = await rows.event("gone")
    await rows.event("gone", "ledger")
    await rows.letter("gone")
    assert "--reason" in await shell.fail("destinations", "reassign", "gone", "ledger", code=2)
    said = await shell.say("destinations", "reassign", "gone", "ledger", "--dry-run")
    assert "Would reassign 2 deliveries of gone to ledger" in said
    assert "Of these, 1 without a new one: their events owed ledger already." in said
    assert "gone has 1 dead letter, too: replay them" in said
    assert 'did you mean "ledger"?' in await shell.fail("destinations", "reassign", "gone", "lodger", "--dry-run")
    assert "ledger is configured" in await shell.fail("destinations", "discard", "ledger", "--reason", "r")
    said = await shell.say("destinations", "reassign", "gone", "ledger", "--reason", "it moved")
    assert "Reassigned 2 deliveries of gone to ledger; in the audit as " in said
    story = await shell.say("events", "show", event)
    assert re.search(r"gone +reassigned +by .+: it moved", story)
    assert re.search(r"gone +discarded .+ reassigned to ledger: it moved", story)

    await shell.say("dead-letters", "replay", "--destination", "gone", "--reason", "to be discarded")
    assert (await shell.json("destinations", "discard", "gone", "--dry-run"))["count"] == 1
    assert "Discarded 1 delivery of gone" in await shell.say("destinations", "discard", "gone", "--reason", "closed")
    assert "Nothing waits for gone" in await shell.say("destinations", "discard", "gone", "--reason", "closed")


async def test_check_looks_at_everything_and_posts_nothing(shell: Shell, door: Door) -> None:
    said = await shell.say("check")
    assert "ok     configuration: 17 sources, 1 policy, 1 route, 2 destinations" in said
    assert "ok     database: reachable, migrated" in said
    assert "ok     destination ledger: http: answers" in said
    assert door.callers == []


async def test_check_fails_for_a_destination_that_is_away_and_says_what_to_do(shell: Shell) -> None:
    result = await shell.type("check")
    assert result.exit_code == 1
    assert "FAILS  destination picky: http: refused the connection; see that it runs" in result.stdout
    assert "2 things fail" in result.stderr


async def test_check_fails_for_a_destination_that_is_gone_from_the_file_and_still_owes(
    shell: Shell, door: Door, rows: Rows
) -> None:
    await rows.open("gone", "forgotten", "settled", partitions=False)
    await rows.event("gone", "ledger")
    for _ in range(2):
        await rows.delivered(await rows.event("forgotten", "settled"), "settled")
    result = await shell.type("check")
    assert result.exit_code == 1
    assert "2 things fail" in result.stderr
    told = [line for line in result.stdout.splitlines() if line.startswith("FAILS")]
    for line, (name, waits) in zip(
        told, (("forgotten", "2 deliveries wait"), ("gone", "1 delivery waits")), strict=True
    ):
        assert line.startswith(f"FAILS  destinations: destinations.{name} is gone from the file, but {waits} for it;")
        assert "put it back with `retired: true`" in line
        assert f"`sluicegate destinations reassign {name} NEW`" in line


async def test_check_tells_how_far_destinations_that_are_retired_are_on_their_way_out(
    shell: Shell, door: Door, rows: Rows
) -> None:
    await rows.open("gone", "settled", partitions=False)
    for _ in range(2):
        await rows.delivered(await rows.event("gone", "settled"), "settled")
    await rows.letter("settled")
    text = shell.config.read_text().replace("to: [ledger, picky]", "to: [ledger]")
    text = text.replace("  picky: {", "  picky: {retired: true, ")
    shell.config.write_text(text + "  gone: {retired: true}\n  settled: {retired: true}\n")
    said = await shell.say("check")
    looks = [line for line in said.splitlines() if line.startswith("look   destination")]
    assert looks == [
        "look   destination gone: retired, and 2 deliveries wait for it, held; reassign or discard what waits",
        "look   destination settled: retired, and nothing waits for it, but its dead letters do (1); decide about them",
        "look   destination picky: retired, and nothing waits for it any more; delete it from the file",
    ]


async def test_check_fails_for_a_policy_that_was_changed_under_its_number(
    shell: Shell, door: Door, database: Database
) -> None:
    await PolicyVersions(database).record(load(shell.config, shell.environment).policies)
    await shell.say("check")
    shell.config.write_text(shell.config.read_text().replace("type: shop.order.paid", "type: shop.order.sent"))
    result = await shell.type("check")
    assert result.exit_code == 1
    assert "FAILS  policies: policies.order was changed and still says version 1" in result.stdout
    assert "give it version 2" in result.stdout


async def test_check_names_every_mistake_of_a_configuration_at_once(shell: Shell) -> None:
    bad = shell.folder / "bad.yaml"
    bad.write_text(CONFIGURATION.replace("purpose:", "porpoise:").replace("to: [ledger, picky]", "to: [ledgr]"))
    said = await shell.fail("check", config=bad)
    assert "mistakes in the configuration" in said
    assert "porpoise" in said
    assert "ledgr" in said
    assert said.count("bad.yaml:") >= 2
    assert "nothing.yaml" in await shell.fail("events", "list", config=shell.folder / "nothing.yaml")


async def test_a_database_that_is_away_is_told_in_a_sentence(shell: Shell, tmp_path: Path) -> None:
    shell.environment["DATABASE"] = f"postgresql://sluicegate@/sluicegate?host={tmp_path}"
    assert "The database is not available" in await shell.fail("events", "list")
    result = await shell.type("check")
    assert result.exit_code == 1
    assert "FAILS  database: " in result.stdout


async def test_a_database_of_ones_own_is_migrated_only_when_asked(shell: Shell, empty_dsn: str) -> None:
    shell.environment["DATABASE"] = empty_dsn
    assert "run `sluicegate migrate` first" in await shell.fail("events", "list")
    assert "FAILS  database: reachable, but 0001" in (await shell.type("check")).stdout
    assert "applied 0001" in await shell.say("migrate")
    assert await shell.say("migrate") == "The database is up to date.\n"
    assert await shell.say("events", "list") == "No events match.\n"


SIGNED = [
    "shop",
    "meter",
    "supplier",
    "square",
    "github",
    "shopify",
    "slack",
    "stripe",
    "twilio",
    "crm",
    "desk",
    "edge",
    "odoo",
]


@pytest.mark.parametrize("source", SIGNED)
async def test_what_is_sent_is_signed_as_its_source_demands(shell: Shell, door: Door, source: str) -> None:
    body = shell.folder / "order.json"
    body.write_text('{"id": 42, "text": "{body} {id} {timestamp}"}')
    assert (await shell.say("send", source, body)).startswith("202 accepted: 019a9f3e")
    assert (await shell.say("send", source, "-", given=b"{}")).startswith("200 seen before: 019a9f3e")
    assert [(name, type(caller)) for name, caller in door.callers] == [(source, Caller)] * 2


async def test_the_id_of_a_message_can_be_given(shell: Shell, door: Door) -> None:
    await shell.say("send", "shop", "-", "--id", "msg_1", given=b"{}")
    (_, caller) = door.callers[0]
    assert isinstance(caller, Caller)
    assert caller.signed_id == "msg_1"


async def test_what_cannot_be_sent_is_told_in_a_sentence(shell: Shell) -> None:
    body = shell.folder / "order.json"
    body.write_text("{}")
    assert "is `sluicegate serve` running" in await shell.fail("send", "shop", body)
    assert "only its issuer" in await shell.fail("send", "lab", body)
    assert "has public keys alone" in await shell.fail("send", "edge-2", body)
    assert "only its sender has" in await shell.fail("send", "keyed", body)
    assert 'did you mean "shop"' in await shell.fail("send", "shpo", body)
    assert "No such file" in await shell.fail("send", "shop", shell.folder / "nothing.json", code=2)


async def test_a_refusal_of_the_door_is_told_with_its_reason(shell: Shell, door: Door) -> None:
    shell.environment["SHOP_SECRET"] = "whsec_b3RoZXItc2VjcmV0LW9mLTMyLWJ5dGVzLTAwMDAwMDA="
    body = shell.folder / "order.json"
    body.write_text("{}")
    served = shell.environment | ENVIRONMENT
    typing = Shell(shell.folder, dict(shell.environment))
    door.shell.environment = served
    assert "401 Not proven: no" in await typing.fail("send", "shop", body)


async def test_a_demo_without_its_extra_says_what_to_install(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sandbox.demo", None)
    assert "pip install 'sluicegate[demo]'" in await shell.fail("demo")


# ── the embedded database ────────────────────────────────────────────────────────────────────────────


def test_a_command_starts_the_embedded_database_for_as_long_as_it_needs_it(tmp_path: Path) -> None:
    """The installed command, in a folder where nothing ever ran."""
    command = [SLUICEGATE]
    (tmp_path / "sluicegate.yaml").write_text(
        CONFIGURATION.replace("PORT", "9").replace("env:DATABASE", "embedded").replace("key: env:KEY", "")
    )

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **ENVIRONMENT}
        return subprocess.run(
            [*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    checked = typed("check")
    assert "ok     database: embedded; the first `sluicegate serve` makes it" in checked.stdout
    assert not (tmp_path / "data").exists(), "looking changes nothing"
    made = typed("token", "create", "--name", "first", "--role", "viewer")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("sg_")
    assert json.loads(typed("token", "list", "--json").stdout)["items"][0]["name"] == "first"
    assert not (tmp_path / "data/postgres/cluster/postmaster.pid").exists(), "nothing keeps running"


def test_a_command_beside_the_embedded_database_finds_it_and_what_ends_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "sluicegate.yaml").write_text(
        CONFIGURATION.replace("PORT", "9").replace("env:DATABASE", "embedded").replace("key: env:KEY", "")
    )
    environment = {**os.environ, **ENVIRONMENT, "PGHOSTADDR": "192.0.2.1", "PGSERVICE": "another"}

    def beside(*words: str) -> subprocess.CompletedProcess[str]:
        command = [SLUICEGATE, "postgres", "--", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    asked = beside("psql", "-Atc", "SELECT current_user, current_database()")
    assert (asked.stdout, asked.returncode) == ("sluicegate|sluicegate\n", 0)
    assert beside("sh", "-c", "pg_isready -q && exit 7").returncode == 7
    assert beside("sh", "-c", "kill -9 $$").returncode == 128 + signal.SIGKILL
    assert "Error: nonesuch cannot be run" in beside("nonesuch").stderr
    assert not (tmp_path / "data/postgres/cluster/postmaster.pid").exists(), "nothing keeps running"


@pytest.mark.parametrize(
    ("told", "said"), [(signal.SIGINT, "1\n"), (signal.SIGTERM, "told\n1\n")], ids=["a terminal's", "for the command"]
)
def test_a_command_beside_the_embedded_database_keeps_it_until_it_has_ended(
    tmp_path: Path, told: signal.Signals, said: str
) -> None:
    (tmp_path / "sluicegate.yaml").write_text(
        CONFIGURATION.replace("PORT", "9").replace("env:DATABASE", "embedded").replace("key: env:KEY", "")
    )
    script = "trap 'echo told' TERM; echo ready; sleep 2 & wait; wait; psql -Atc 'SELECT 1'"
    with subprocess.Popen(
        [SLUICEGATE, "postgres", "--", "sh", "-c", script],
        cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        assert command.stdout
        assert command.stdout.readline() == "ready\n"
        command.send_signal(told)
        assert command.stdout.read() == said
    assert command.returncode == 0


async def test_a_command_beside_a_database_of_ones_own_is_refused_without_its_address(shell: Shell) -> None:
    said = await shell.fail("postgres", "--config", shell.config, "psql")
    assert "a Postgres of your own" in said
    assert shell.environment["DATABASE"] not in said


async def test_a_command_says_on_stderr_that_it_waits_for_a_database_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "sluicegate.yaml").write_text(
        CONFIGURATION.replace("PORT", "9").replace("env:DATABASE", "embedded").replace("key: env:KEY", "")
    )
    embedded = await Embedded.start(tmp_path)
    postmaster = int((tmp_path / "data/postgres/cluster/postmaster.pid").read_text().split()[0])
    os.kill(postmaster, signal.SIGSTOP)
    try:
        command = await asyncio.create_subprocess_exec(
            SLUICEGATE, "token", "list",
            cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert command.stderr
        said = (await asyncio.wait_for(command.stderr.readline(), 20)).decode()
    finally:
        os.kill(postmaster, signal.SIGCONT)
    answer, _ = await asyncio.wait_for(command.communicate(), 30)
    await embedded.stop()
    assert "waiting for Postgres" in said
    assert f"{tmp_path}/data/postgres/log" in said
    assert answer.decode().startswith("No tokens.")
    assert command.returncode == 0


# ── words ────────────────────────────────────────────────────────────────────────────────────────────


def test_spans_of_time_and_numbers_are_said_as_people_say_them() -> None:
    said = {0: "0.0 s", 0.44: "0.4 s", 41: "41 s", 119: "119 s", 150: "2 min", 8940: "2 h 29 min", 273600: "3 d 4 h"}
    assert {seconds: span(timedelta(seconds=seconds)) for seconds in said} == said
    assert span(timedelta(seconds=-5)) == "0.0 s"
    assert [counted(1, "policy"), counted(2, "policy"), counted(1200, "source")] == ["1 policy", "2 policies", "1,200 sources"]  # fmt: skip
