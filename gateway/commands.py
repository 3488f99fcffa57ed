"""What the commands do, and what they answer; how they are typed stands in gateway/cli.py."""

import asyncio
import os
import pwd
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
import msgspec

from connectors import kinds
from connectors.settings import NAME, did_you_mean
from dead_letter.audit import Audit
from dead_letter.left_behind import CannotMoveError, LeftBehind, LeftPreview, Moved
from dead_letter.letters import DeadLetters, EmptySelectionError, Select
from dead_letter.tokens import THE_PROGRAM, Role, Tokens
from gateway import config as configuration
from gateway import show
from gateway.config import Config, ConfigurationError
from gateway.destinations import home_called, homes, lines, refuse_what_is_delivered
from gateway.policy_diff import differences
from gateway.policy_draft import NoSampleError, draft
from gateway.policy_report import report
from gateway.policy_trial import try_sample
from gateway.silence import Expectation, expectation
from observability.failpoints import VARIABLE, FailpointsError, arm
from observability.logs import configure
from outbox.database import Database, Session, Unavailable, UnsuitableError, migrations_pending
from outbox.database import migrate as apply
from outbox.destinations import Destinations, UnknownDestinationError
from outbox.embedded import beside, running
from outbox.embedded_folder import EmbeddedError
from outbox.page import BadCursorError
from outbox.pooler import refuse_pooler
from outbox.records import Records

Answer = TypeVar("Answer")


def expected(error: Exception) -> str | None:
    """What went wrong, as a person needs to hear it; None for what nobody expected."""
    match error:
        case ConfigurationError(mistakes=mistakes):
            count = "One mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
            return "\n".join([f"{count} in the configuration:", *(f"  {mistake}" for mistake in mistakes)])
        case Unavailable():
            return f"The database is not available: {error}"
        case (
            FailpointsError()
            | UnsuitableError()
            | EmbeddedError()
            | UnknownDestinationError()
            | CannotMoveError()
            | BadCursorError()
            | EmptySelectionError()
            | NoSampleError()
        ):
            return str(error)
        case _:
            return None


# ── the program ──────────────────────────────────────────────────────────────────────────────────────


def check(path: Path) -> None:
    from gateway.check import check as look_at_everything  # noqa: PLC0415 — what connectors bring takes its time

    config = load(path)
    parts = (len(config.sources), "source"), (len(config.policies), "policy"), (len(config.routes), "route")
    counted = ", ".join(show.counted(n, what) for n, what in (*parts, (len(config.destinations), "destination")))
    click.echo(f"ok     configuration: {counted}")
    for warning in config.warnings:
        click.echo(f"look   {warning}")

    async def look() -> int:
        failed = 0
        async for found in look_at_everything(config, version=version("sluicegate")):
            mark = "look" if found.doubtful else "ok" if found.good else "FAILS"
            click.echo(f"{mark:<6} {found.what}: {found.says}")
            failed += not found.good
        return failed

    if failed := run(look()):
        raise click.ClickException("One thing fails." if failed == 1 else f"{failed} things fail.")


def migrate(path: Path) -> str:
    config = load(path)

    async def migrated() -> list[str]:
        async with address(config) as dsn:
            if config.database != "embedded":
                await refuse_pooler(dsn)
            return await apply(dsn)

    return "\n".join(f"applied {name}" for name in run(migrated())) or "The database is up to date."


def postgres(path: Path, command: Sequence[str]) -> int:
    """The exit status of a command that works with the embedded Postgres."""
    config = load(path)
    if config.database != "embedded":
        raise click.ClickException(
            "This configuration names a Postgres of your own: use the programs that belong to it, with its own address."
        )

    async def beside_it() -> int:
        async with running(config.folder) as dsn:
            return await run_to_its_end(command, beside(dsn, os.environ))

    return run(beside_it())


async def run_to_its_end(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """A signal that ends programs is for this one: what it needs stays until it has ended."""
    loop = asyncio.get_running_loop()

    def pass_on(told: signal.Signals) -> None:
        process.send_signal(told)

    loop.add_signal_handler(signal.SIGINT, lambda: None)  # a terminal tells both
    for told in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(told, pass_on, told)
    try:
        process = subprocess.Popen(command, env=environ)  # noqa: ASYNC220, S603 — no signal comes between
    except OSError as error:
        raise click.ClickException(f"{command[0]} cannot be run: {error.strerror}") from error
    status = await asyncio.to_thread(process.wait)
    return status if status >= 0 else 128 - status  # as a shell tells that a signal ended it


def send(path: Path, source: str, body: bytes, message: str | None) -> str:
    from gateway import send as sending  # noqa: PLC0415 — it brings an HTTP client

    config = load(path)
    if source not in config.sources:
        raise click.ClickException(f'There is no source "{source}"{did_you_mean(source, list(config.sources))}')
    try:
        serve = config.serve
        answered = run(
            sending.send(config.sources[source], body, to=serve.listen[0], public_url=serve.public_url, id=message)
        )
    except sending.SendError as error:
        raise click.ClickException(str(error)) from error
    try:
        told = msgspec.json.decode(answered.body, type=dict[str, Any])
    except msgspec.MsgspecError:
        told = {}
    if answered.status >= 400:
        raise click.ClickException(f"{answered.status} {told.get('title', '')}: {told.get('detail', 'no detail')}")
    return f"{answered.status} {'seen before' if told.get('duplicate') else 'accepted'}: {told.get('id', '')}"


# ── events ───────────────────────────────────────────────────────────────────────────────────────────


def list_events(path: Path, *, in_json: bool, **wanted: Any) -> str:
    found = at_desk(path, lambda desk: desk.records.events(**wanted))
    return as_json(found) if in_json else show.events(found)


def show_event(path: Path, event: UUID, *, in_json: bool) -> str:
    async def read(desk: Desk) -> tuple[Any, Any, Any]:
        letters = await desk.letters.letters(Select(events=(event,)), limit=200)
        return await desk.records.event(event), letters.items, await desk.audit.of_event(event)

    found, letters, deeds = at_desk(path, read)
    if found is None:
        raise click.ClickException(f"There is no event {event}, or retention has taken it.")
    if in_json:
        return as_json({**msgspec.to_builtins(found), "deeds": deeds})
    return show.event_story(found, letters, deeds)


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────────


def list_letters(path: Path, *, in_json: bool, cursor: str | None, limit: int, **wanted: Any) -> str:
    select = Select(**wanted)
    found = at_letters(path, select, lambda letters: letters.letters(select, cursor=cursor, limit=limit))
    return as_json(found) if in_json else show.letters(found)


def list_causes(path: Path, *, in_json: bool, cursor: str | None, limit: int, **wanted: Any) -> str:
    select = Select(**wanted)
    found = at_letters(path, select, lambda letters: letters.causes(select, cursor=cursor, limit=limit))
    return as_json(found) if in_json else show.causes(found)


def show_letter(path: Path, event: UUID, destination: str | None, *, in_json: bool) -> str:
    async def read(desk: Desk) -> tuple[Any, Any, Any]:
        letters = await desk.letters.letters(Select(events=(event,), destination=destination), limit=200)
        return await desk.records.event(event), letters.items, await desk.audit.of_event(event)

    found, letters, deeds = at_desk(path, read)
    if not letters:
        raise click.ClickException(
            "There is no such dead letter; `sluicegate events show` tells where the event stands."
        )
    attempts = {delivery.destination: delivery.attempts for delivery in found.deliveries} if found else {}
    told = [
        (
            letter,
            attempts.get(letter.destination, []),
            [deed for deed in deeds if f"{event}/{letter.destination}" in deed.detail["deliveries"]],
        )
        for letter in letters
    ]
    if in_json:
        return as_json(
            {"items": [{"letter": letter, "attempts": tries, "deeds": deeds} for letter, tries, deeds in told]}
        )
    return "\n\n".join(show.letter(*each) for each in told)


def repair(
    path: Path, verb: str, *, in_json: bool, dry_run: bool, reason: str | None, event: tuple[UUID, ...], **wanted: Any
) -> str:
    """Replay or discard; who did it stands in the audit as the user of this machine."""
    select = Select(events=event or None, **wanted)
    if select.empty:
        raise click.UsageError(
            "Name what to take: --event, --destination, --cause, --subject, --facility, --from, --to."
        )
    if dry_run:
        preview = at_letters(path, select, lambda letters: letters.preview(select))
        return as_json(preview) if in_json else show.preview(preview, verb)
    if reason is None:
        raise click.UsageError("Say why with --reason; or look first with --dry-run.")
    why = one_line(reason, "--reason")
    if verb == "replay":
        done = at_letters(path, select, lambda letters: letters.replay(select, reason=why, actor=me()))
    else:
        done = at_letters(path, select, lambda letters: letters.discard(select, reason=why, actor=me()))
    return as_json(done) if in_json else show.repair(done, verb)


def at_letters(path: Path, select: Select, work: Callable[[DeadLetters], Awaitable[Answer]]) -> Answer:
    """A destination that nobody knows is a slip of the fingers, and not one without dead letters."""

    async def look(desk: Desk) -> Answer:
        if select.destination is not None:
            await desk.destinations.require(select.destination, configured=desk.config.destinations)
        return await work(desk.letters)

    return at_desk(path, look)


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────


def list_sources(path: Path, *, in_json: bool) -> str:
    found = at_desk(path, lambda desk: desk.expectation())
    return as_json(found) if in_json else show.expectation(found)


def diagnose(
    path: Path, name: str, *, tell: Callable[[str], None], in_json: bool, reason: str, minutes: float, requests: int
) -> None:
    """Tells each finding as it comes; interrupting it ends it everywhere."""
    from gateway import diagnosis  # noqa: PLC0415 — it knows every scheme, which takes its time

    why = one_line(reason, "--reason")
    config = load(path)
    if name not in config.sources:
        raise click.ClickException(f'There is no source "{name}"{did_you_mean(name, list(config.sources))}')

    async def look(desk: Desk) -> int:
        found = 0
        await desk.audit.note(actor=me(), action="source.diagnose", target=name, reason=why)
        async with desk.session() as session:
            asking = lambda: None if in_json else tell(show.diagnosing(name, minutes, requests))  # noqa: E731
            async for finding in diagnosis.ask(session, name, seconds=minutes * 60, requests=requests, asking=asking):
                found += 1
                tell(msgspec.json.encode(finding).decode() if in_json else show.finding(finding))
        return found

    with suppress(KeyboardInterrupt):
        if not at_desk(path, look) and not in_json:
            tell(f"Nothing of {name} was refused meanwhile.")


# ── destinations ─────────────────────────────────────────────────────────────────────────────────────


def list_destinations(path: Path, *, in_json: bool) -> str:
    async def read(desk: Desk) -> Any:
        connectors = {name: found.connector for name, found in desk.config.destinations.items()}
        return lines(await desk.records.standings(), connectors)

    found = at_desk(path, read)
    return as_json({"items": found, "next": None}) if in_json else show.destinations(found)


def hold(path: Path, name: str, reason: str, until: datetime | None) -> str:
    why = one_line(reason, "--reason")
    if until is not None and until <= datetime.now(UTC):
        raise click.BadParameter(f"{show.second(until)} is over; write a time to come", param_hint="--until")
    at_desk(path, lambda desk: known(desk, desk.destinations.hold(name, until=until, reason=why, by=me())))
    return f"{name} is held{f' until {show.second(until)}' if until else ''}: deliveries to it wait."


def release(path: Path, name: str, reason: str) -> str:
    why = one_line(reason, "--reason")
    held = at_desk(path, lambda desk: known(desk, desk.destinations.release(name, by=me(), reason=why)))
    return f"{name} is released: what waited goes out." if held else f"{name} was not held."


def move(path: Path, name: str, to: str | None, *, in_json: bool, dry_run: bool, reason: str | None) -> str:
    """Reassign what waits, or discard it, where it goes nowhere; who did it stands in the audit."""
    if reason is None and not dry_run:
        raise click.UsageError("Say why with --reason; or look first with --dry-run.")
    why, verb = one_line(reason, "--reason") if reason is not None else "", "reassign" if to else "discard"

    async def take(desk: Desk) -> Moved | LeftPreview:
        refuse_what_is_delivered(name, desk.config.destinations)
        home = home_called(to, homes(desk.config)) if to else None
        if dry_run:
            return await desk.left.preview(name, home)
        if home is None:
            return await desk.left.discard(name, reason=why, actor=me())
        return await desk.left.reassign(name, home, reason=why, actor=me())

    done = at_desk(path, take)
    if in_json:
        return as_json(done)
    return show.moved(done, verb, name, to) if isinstance(done, Moved) else show.left(done, verb, name, to)


async def known(desk: "Desk", deed: Awaitable[Answer]) -> Answer:
    """A destination that is configured is known to the database once a `serve` has run with it."""
    try:
        return await deed
    except UnknownDestinationError as unknown:
        if unknown.name in desk.config.destinations:
            raise click.ClickException(
                f"No `sluicegate serve` has run with {unknown.name} in its configuration yet: nothing goes there."
            ) from unknown
        raise


# ── the rest ─────────────────────────────────────────────────────────────────────────────────────────


def list_connectors(path: Path, *, in_json: bool) -> str:
    used = list(load(path).destinations.values()) if path.exists() else []
    found = [
        {"name": name, "destinations": sorted(each.name for each in used if each.connector == name)}
        for name in sorted(kinds())
    ]
    if in_json:
        return as_json({"items": found, "next": None})
    return show.rows(
        ["KIND", "DESTINATIONS"], [[each["name"], ", ".join(each["destinations"]) or "–"] for each in found]
    )


def try_policy(path: Path, name: str | None, body: bytes, in_json: bool) -> tuple[str, bool]:  # noqa: FBT001
    """What is told of a sample, and whether all of it would be accepted."""
    config = load(path)
    if name is None and len(config.sources) != 1:
        raise click.UsageError(f"Say as which source it would be posted: --source {' | '.join(config.sources)}")
    name = name or next(iter(config.sources))
    if name not in config.sources:
        raise click.ClickException(f'There is no source "{name}"{did_you_mean(name, tuple(config.sources))}')
    trials = try_sample(config.sources[name], config.policies, body)
    accepted = not any(trial.wrong for trial in trials)
    return as_json({"events": trials}) if in_json else "\n\n".join(map(show.trial, trials)) or "No events.", accepted


def draft_policy(name: str, body: bytes) -> str:
    if not re.fullmatch(NAME, name):
        raise click.BadParameter("use up to 63 of a-z, 0-9 and -", param_hint="--name")
    return draft(body, name)


def diff_policies(old: Path, new: Path, in_json: bool) -> tuple[str, bool]:  # noqa: FBT001
    """What is told of two files, and whether all that changed has a new number."""
    found = differences(*(configuration.load_policies(path, os.environ) for path in (old, new)))
    numbered = not any(each.unnumbered for each in found)
    return as_json({"policies": found}) if in_json else show.differences(found), numbered


def report_policies(path: Path, *, html: bool) -> str:
    return report(load(path), html=html)


def schema() -> str:
    return as_json(configuration.schema())


def create_token(path: Path, name: str, role: str) -> str:
    holder = one_line(name, "--name")
    if holder == THE_PROGRAM:
        raise click.BadParameter("that is what the program calls itself; take another name", param_hint="--name")
    return at_desk(path, lambda desk: desk.tokens.create(holder, Role(role), by=me()))


def list_tokens(path: Path, *, in_json: bool) -> str:
    found = at_desk(path, lambda desk: desk.tokens.all())
    return as_json({"items": found, "next": None}) if in_json else show.tokens(found)


def revoke_token(path: Path, token: str) -> str:
    if not at_desk(path, lambda desk: desk.tokens.revoke(token, by=me())):
        raise click.ClickException("There is no token of this id; `sluicegate token list` shows them.")
    return "Revoked: it is refused from now on."


# ── what they stand on ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """What a command works with."""

    config: Config
    records: Records
    letters: DeadLetters
    destinations: Destinations
    left: LeftBehind
    audit: Audit
    tokens: Tokens
    expectation: Callable[[], Awaitable[Expectation]]
    session: Callable[[], AbstractAsyncContextManager[Session]]


def at_desk(path: Path, work: Callable[[Desk], Awaitable[Answer]]) -> Answer:
    """Do something with the database of a configuration."""

    async def sit_down() -> Answer:
        async with desk(load(path)) as found:
            return await work(found)

    return run(sit_down())


@asynccontextmanager
async def desk(config: Config) -> AsyncIterator[Desk]:
    """Opened for as long as a command needs it.

    An embedded database that is new is made ready; a schema in another's is changed only by who asks for it.
    """
    async with address(config) as dsn:
        if pending := await migrations_pending(dsn):
            if config.database != "embedded":
                raise click.ClickException(f"The database lacks {', '.join(pending)}: run `sluicegate migrate` first.")
            await apply(dsn)
        database = await Database.connect(dsn, size=1, application="sluicegate command")
        try:
            yield Desk(
                config=config,
                records=Records(database, configured=lambda: config.destinations),
                letters=DeadLetters(database),
                destinations=Destinations(database),
                left=LeftBehind(database),
                audit=Audit(database),
                tokens=Tokens(database),
                expectation=lambda: expectation(database, config),
                session=database.session,
            )
        finally:
            await database.close()


@asynccontextmanager
async def address(config: Config) -> AsyncIterator[str]:
    """The DSN; the embedded database is started if it does not run."""
    if config.database == "embedded":
        async with running(config.folder) as dsn:
            yield dsn
    else:
        yield config.database.reveal()


def load(path: Path) -> Config:
    arm(os.environ.get(VARIABLE, ""))
    return configuration.load(path, os.environ)


def run(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a command's work; what has to be said meanwhile goes to stderr, so that stdout is the answer alone."""
    with configure("console", level="warning", to=sys.stderr):
        return asyncio.run(work)


def as_json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()


def one_line(text: str, option: str) -> str:
    """What goes into the audit is one printable line."""
    if not text.strip() or not text.isprintable():
        raise click.BadParameter("write one line of text", param_hint=option)
    return text.strip()


def me() -> str:
    """Who stands in the audit."""
    try:
        return f"{pwd.getpwuid(os.getuid()).pw_name} (command line)"
    except KeyError:
        return f"user {os.getuid()} (command line)"
