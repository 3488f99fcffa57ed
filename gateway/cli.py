"""What is typed: the commands and their options.

What they do stands in gateway/commands.py, which is imported when one of them runs: so `--help` is there at once.
What `serve` does begins in gateway/serve.py, with as little as it can.
"""

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

Command = TypeVar("Command", bound=Callable[..., Any])

ROLES = ("viewer", "operator", "lead", "engineer", "auditor", "admin")  # dead_letter.tokens.Role, without importing it


if TYPE_CHECKING:
    from gateway import commands
else:

    class commands:  # noqa: N801 — stands for the module, until a command needs it
        def __getattr__(self, name: str) -> Any:
            return getattr(import_module("gateway.commands"), name)

    commands = commands()


class Sluicegate(click.Group):
    """Tells an expected failure in a sentence and exits with 1; a defect of ours keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if (told := commands.expected(error)) is None:
                raise
            raise click.ClickException(told) from error


class Instant(click.ParamType[datetime]):
    """A time as RFC 3339; without a zone it is UTC, without a time of day it is the beginning of the day."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time; write it as 2026-11-23 or 2026-11-23T10:00:00Z", param, ctx)
        return at if at.tzinfo else at.replace(tzinfo=UTC)


def options(*given: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one, shown in the order in which they stand here."""

    def decorate(command: Command) -> Command:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


configured = click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default="sluicegate.yaml",
    show_default=True,
    help="The configuration.",
)
in_json = click.option("--json", "in_json", is_flag=True, help="Answer in JSON.")
paged = options(
    click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="How many at most."),
    click.option("--cursor", help="Go on where the page before ended."),
)
about = options(
    click.option("--subject", help="About this record, such as purchase.order/42."),
    click.option("--facility", help="Of this facility."),
)
died = options(
    click.option("--destination", help="For this destination."),
    click.option("--cause", help="Of this cause, as `dead-letters causes` names it."),
    about,
    click.option("--from", "since", type=Instant(), help="That died at this time or later."),
    click.option("--to", "until", type=Instant(), help="That died before this time."),
)
why = click.option("--reason", required=True, help="Why; it stands in the audit.")


@click.group(cls=Sluicegate, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sluicegate", message="sluicegate %(version)s")
def main() -> None:
    """Sluicegate: an integration gateway and outbox broker."""


# ── the program ──────────────────────────────────────────────────────────────────────────────────────


@main.command()
@configured
@click.option(
    "--role",
    type=click.Choice(["all", "gateway", "dispatcher"]),
    default="all",
    show_default=True,
    help="What this process does; there is no console in this version.",
)
@click.option("--workers", type=click.IntRange(1, 64), help="Processes that share the port; else as configured.")
def serve(path: Path, role: str, workers: int | None) -> None:
    """Take events in and deliver them, until SIGTERM or Ctrl-C."""
    from gateway import serve as first_moments  # noqa: PLC0415

    sys.exit(first_moments.serve(path, role, workers))


@main.command()
@configured
def check(path: Path) -> None:
    """Look at configuration, database and every destination.

    Changes and posts nothing.
    """
    commands.check(path)


@main.command()
@configured
def migrate(path: Path) -> None:
    """Bring the database to the schema of this version."""
    click.echo(commands.migrate(path))


@main.command(context_settings={"allow_interspersed_args": False})
@configured
@click.argument("command", nargs=-1, required=True)
def postgres(path: Path, command: tuple[str, ...]) -> None:
    """Run COMMAND beside the embedded Postgres.

    The server's own programs (psql, pg_dump, pg_restore, …) come first in PATH and find the database by themselves;
    the server runs until COMMAND ends, whose exit status this has, too.  Write `--` before COMMAND.
    """
    sys.exit(commands.postgres(path, command))


@main.command()
@configured
@click.argument("source")
@click.argument("file", type=click.File("rb"))
@click.option("--id", "message", help="The id of the message, where the scheme has one; else a new one.")
def send(path: Path, source: str, file: IO[bytes], message: str | None) -> None:
    """Sign FILE as SOURCE would, and post it.

    It goes to the gateway that runs with this configuration; `-` is standard input.
    """
    click.echo(commands.send(path, source, file.read(), message))


@main.command()
@configured
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data/demo"),
    show_default=True,
    help="Where it works; what it needs is made there.",
)
def demo(path: Path, folder: Path) -> None:  # noqa: ARG001 — it brings its own; every command takes the option
    """See it at work with partners of its own.

    Ctrl-C stops it.
    """
    try:
        from sandbox.demo import run  # noqa: PLC0415 — no part of the product but this
    except ModuleNotFoundError as missing:
        install = "pip install 'sluicegate[demo]'"
        raise click.ClickException(f"The demo needs {missing.name}, which is not installed: {install}") from missing
    sys.exit(run(folder))


# ── events ───────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def events() -> None:
    """What was accepted, and what became of it."""


@events.command("list")
@options(
    configured,
    in_json,
    click.option("--source", help="Of this source."),
    click.option("--type", help="Of this type; a trailing .* takes everything below."),
    about,
    click.option("--from", "since", type=Instant(), help="Accepted at this time or later."),
    click.option("--to", "until", type=Instant(), help="Accepted before this time."),
    paged,
)
def list_events(path: Path, **wanted: Any) -> None:
    """Events, the newest first."""
    click.echo(commands.list_events(path, **wanted))


@events.command("show")
@options(configured, in_json, click.argument("event", type=click.UUID))
def show_event(path: Path, event: UUID, **how: Any) -> None:
    """One event: what was kept of it, and everything that happened to it, with trace ids."""
    click.echo(commands.show_event(path, event, **how))


# ── dead letters ─────────────────────────────────────────────────────────────────────────────────────


@main.group("dead-letters")
def dead_letters() -> None:
    """What could not be delivered: find, replay, discard."""


@dead_letters.command("list")
@options(configured, in_json, died, paged)
def list_letters(path: Path, **wanted: Any) -> None:
    """Deliveries that gave up, the newest first."""
    click.echo(commands.list_letters(path, **wanted))


@dead_letters.command("causes")
@options(configured, in_json, died, paged)
def list_causes(path: Path, **wanted: Any) -> None:
    """What stopped them, each cause once, with what to do about it."""
    click.echo(commands.list_causes(path, **wanted))


@dead_letters.command("show")
@options(
    configured,
    in_json,
    click.argument("event", type=click.UUID),
    click.option("--destination", help="Only the one for this destination."),
)
def show_letter(path: Path, event: UUID, destination: str | None, **how: Any) -> None:
    """Why an event could not be delivered, what to do, and every try."""
    click.echo(commands.show_letter(path, event, destination, **how))


repairs = options(
    configured,
    in_json,
    click.option("--event", type=click.UUID, multiple=True, help="Of this event; may stand more than once."),
    died,
    click.option("--reason", help="Why; it stands in the audit."),
    click.option("--dry-run", is_flag=True, help="Say what would be taken, and change nothing."),
)


@dead_letters.command("replay")
@repairs
def replay(path: Path, **wanted: Any) -> None:
    """Send dead letters again: all that match everything that is named."""
    click.echo(commands.repair(path, "replay", **wanted))


@dead_letters.command("discard")
@repairs
def discard(path: Path, **wanted: Any) -> None:
    """Lay dead letters aside for good: all that match everything that is named."""
    click.echo(commands.repair(path, "discard", **wanted))


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def sources() -> None:
    """Who posts."""


@sources.command("list")
@options(configured, in_json)
def list_sources(path: Path, **how: Any) -> None:
    """When each was heard last, what is expected of it, and what is missing; and destinations that are late."""
    click.echo(commands.list_sources(path, **how))


@sources.command("diagnose")
@options(configured, in_json)
@click.argument("name")
@click.option("--reason", default="why its posts are refused", help="Why you look; it goes into the audit.")
@click.option("--minutes", type=click.FloatRange(0.05, 15), default=15.0, show_default=True, help="For how long.")
@click.option("--requests", type=click.IntRange(1, 20), default=20, show_default=True, help="For how many requests.")
def diagnose(path: Path, name: str, **how: Any) -> None:
    """Watch what is refused of a source, and hear which common mistake would have verified.

    Shows names and lengths of headers, never a value, and stores nothing but who looked.
    """
    commands.diagnose(path, name, tell=click.echo, **how)


# ── destinations ─────────────────────────────────────────────────────────────────────────────────────


@main.group()
def destinations() -> None:
    """Where events go, and how each place is doing."""


@destinations.command("list")
@options(configured, in_json)
def list_destinations(path: Path, **how: Any) -> None:
    """Every destination, with what waits for it."""
    click.echo(commands.list_destinations(path, **how))


@destinations.command("hold")
@options(
    configured,
    click.argument("name"),
    why,
    click.option("--until", type=Instant(), help="When it ends by itself; else when somebody releases it."),
)
def hold(path: Path, name: str, reason: str, until: datetime | None) -> None:
    """Deliver nothing there any more; what is owed is kept."""
    click.echo(commands.hold(path, name, reason, until))


@destinations.command("release")
@options(configured, click.argument("name"), why)
def release(path: Path, name: str, reason: str) -> None:
    """Deliver there again."""
    click.echo(commands.release(path, name, reason))


moves = options(
    click.option("--reason", help="Why; it stands in the audit."),
    click.option("--dry-run", is_flag=True, help="Say what would be taken, and change nothing."),
    in_json,
)


@destinations.command("reassign")
@options(configured, click.argument("old"), click.argument("new"), moves)
def reassign(path: Path, old: str, new: str, **how: Any) -> None:
    """Send to NEW what waits for OLD, which is not configured any more."""
    click.echo(commands.move(path, old, new, **how))


@destinations.command("discard")
@options(configured, click.argument("name"), moves)
def discard_left(path: Path, name: str, **how: Any) -> None:
    """Lay aside for good what waits for NAME, which is not configured any more."""
    click.echo(commands.move(path, name, None, **how))


# ── policies ─────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def policy() -> None:
    """What is kept, and what is not."""


@policy.command("test")
@options(
    configured,
    in_json,
    click.option("--source", help="As this source would post it; needed where there are several."),
    click.argument("sample", type=click.File("rb")),
)
def try_policy(path: Path, source: str | None, sample: IO[bytes], in_json: bool) -> None:  # noqa: FBT001
    """Say what would be kept of SAMPLE, what dropped, and why.

    Nothing is posted or stored, and of what is not kept no value is shown.  The status is 1 if it would be refused.
    """
    told, accepted = commands.try_policy(path, source, sample.read(), in_json)
    click.echo(told)
    sys.exit(0 if accepted else 1)


@policy.command("draft")
@options(
    configured,
    click.option("--name", default="drafted", show_default=True, help="What to call it."),
    click.argument("sample", type=click.File("rb")),
)
def draft_policy(path: Path, name: str, sample: IO[bytes]) -> None:  # noqa: ARG001 — every command takes it
    """Propose a policy for what SAMPLE is one of: closed, so that a person opens what is needed."""
    click.echo(commands.draft_policy(name, sample.read()))


@policy.command("diff")
@options(
    configured,
    in_json,
    click.argument("old", type=click.Path(path_type=Path, dir_okay=False, exists=True)),
    click.argument("new", type=click.Path(path_type=Path, dir_okay=False, exists=True), required=False),
)
def diff_policies(path: Path, old: Path, new: Path | None, in_json: bool) -> None:  # noqa: FBT001
    """Say what the policies in NEW keep otherwise than those in OLD; NEW is the configuration, if none is named.

    The status is 1 if one changed what it keeps and has its old number.
    """
    told, numbered = commands.diff_policies(old, new or path, in_json)
    click.echo(told)
    sys.exit(0 if numbered else 1)


@policy.command("report")
@options(configured, click.option("--html", is_flag=True, help="In HTML; else in Markdown."))
def report_policies(path: Path, html: bool) -> None:  # noqa: FBT001
    """The auditor's page: purposes, classes, fields, destinations."""
    click.echo(commands.report_policies(path, html=html))


# ── the rest ─────────────────────────────────────────────────────────────────────────────────────────


@main.group()
def connectors() -> None:
    """Kinds of destination."""


@connectors.command("list")
@options(configured, in_json)
def list_connectors(path: Path, **how: Any) -> None:
    """Every kind that is installed, and which destinations are of it."""
    click.echo(commands.list_connectors(path, **how))


@main.group()
def config() -> None:
    """The configuration itself."""


@config.command("schema")
@configured
def schema(path: Path) -> None:  # noqa: ARG001 — every command takes it
    """The JSON Schema of sluicegate.yaml, for editors."""
    click.echo(commands.schema())


@main.group()
def token() -> None:
    """Who may use the API."""


@token.command("create")
@options(
    configured,
    click.option("--name", required=True, help="Whose it is; it stands in the audit beside what is done with it."),
    click.option("--role", required=True, type=click.Choice(ROLES), help="What its holder may do."),
)
def create_token(path: Path, name: str, role: str) -> None:
    """Make a token, and print it, once, alone on the last line."""
    made = commands.create_token(path, name, role)
    click.echo("It is shown this once: keep it where secrets are kept.", err=True)
    click.echo(made)


@token.command("list")
@options(configured, in_json)
def list_tokens(path: Path, **how: Any) -> None:
    """Every token that is good; none can be shown again."""
    click.echo(commands.list_tokens(path, **how))


@token.command("revoke")
@options(configured, click.argument("id"))
def revoke_token(path: Path, id: str) -> None:  # noqa: A002
    """Take a token back, by its id: what stands between its first two underscores."""
    click.echo(commands.revoke_token(path, id))


if __name__ == "__main__":
    main()
