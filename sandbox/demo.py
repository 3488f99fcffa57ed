"""`sluicegate demo`: the program at work, with partners of its own, told live in one terminal.

    place      a folder with a configuration and secrets, made for it
    partners   real servers on loopback: Odoo's stand-in, receivers that verify, an SMTP server
    program    `sluicegate serve` on an embedded Postgres, as a process of its own
    story      posts, and says what the door answered
    watch      asks the API what became of each event, and says it

What was started last is stopped first, however it ends.
"""

import asyncio
import shutil
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

from dead_letter.tokens import Role
from gateway import config as configuration
from gateway.commands import desk
from gateway.config import Config
from observability.logs import configure
from sandbox.partners import Partners, partners
from sandbox.place import Place
from sandbox.program import Program
from sandbox.story import Story
from sandbox.terminal import Fate, Terminal
from sandbox.watch import Watch


def run(folder: Path) -> int:
    """Until Ctrl-C or SIGTERM; the exit status."""
    with configure("console", level="warning", to=sys.stderr), Place.taken(folder) as place:
        return asyncio.run(Demo(place, Terminal(sys.stdout)).run())


class Demo:
    """One run in one folder."""

    def __init__(self, place: Place, terminal: Terminal) -> None:
        self._place = place
        self._terminal = terminal

    async def run(self) -> int:
        """All of it, until it is told to stop; what was started last is stopped first."""
        stop = _signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        work = asyncio.create_task(self._work())
        told = asyncio.create_task(stop.wait())
        await asyncio.wait({work, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not work.done():
            self._terminal.say()
            self._terminal.say("Stopping: what is under way is finished first.")
            work.cancel()
        await asyncio.wait({work})
        if not work.cancelled():
            work.result()
        self._terminal.say("Stopped. What was still owed is kept, and goes out at the next start.")
        return 0

    async def _work(self) -> None:
        async with AsyncExitStack() as parts:
            config = configuration.load(self._place.config, {})
            url = f"http://127.0.0.1:{self._place.listen}"
            self._terminal.say("Sluicegate starts, on a Postgres of its own.")
            found = await parts.enter_async_context(
                partners(
                    self._place.ports,
                    self._place.secrets,
                    lambda about, text: self._terminal.happened(Fate.PARTNER, about, text),
                )
            )
            program = await parts.enter_async_context(Program.running(self._place.config, self._place.log, url))
            program.believe(await self._token(config, program))
            watch = Watch(program, self._terminal)
            await watch.remember()
            self._introduce(found, url)
            story = Story(
                config,
                watch,
                self._terminal,
                ledger=f"{found.receivers.url}/ledger",
                random=Random(),  # noqa: S311 — a story
            )
            try:
                async with asyncio.TaskGroup() as together:
                    together.create_task(program.watch())
                    together.create_task(watch.run())
                    together.create_task(self._tell(story, watch, program))
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None  # one is enough to be told

    async def _tell(self, story: Story, watch: Watch, program: Program) -> None:
        await story.opening()
        await self._books(program)
        self._look_around(watch, program.url)
        await story.go_on()

    async def _token(self, config: Config, program: Program) -> str:
        """The token of the run before, or a new one, made as `sluicegate token create` makes it."""
        if self._place.token.exists():
            token = self._place.token.read_text().strip()
            program.believe(token)
            if await program.ask("/events", limit=1) is not None:
                return token
        async with desk(config) as found:
            token = await found.tokens.create("demo", Role.LEAD, by="sluicegate demo")
        self._place.keep_token(token)
        return token

    # ── what it says of itself ───────────────────────────────────────────────────────────────────

    def _introduce(self, found: Partners, url: str) -> None:
        say = self._terminal.say
        say()
        say(f"  gateway        {url}  its log: {_near(self._place.log)}")
        say(f"  Odoo           {found.odoo.url}  a stand-in; takes notes and activities")
        say(f"  four partners  {found.receivers.url}  ledger, mail, on-call, register")
        say(f"  SMTP server    127.0.0.1:{found.mailbox.port}         what mail hands over lands here")
        say()
        say("Commands that are shown here work in another terminal, after")
        say(f"  cd {_near(self._place.folder)}{_activate()}")
        say()

    async def _books(self, program: Program) -> None:
        """The two sums that prove that nothing was lost."""
        books = await program.ask("/invariants")
        if books is None:
            return
        events, owed = books["events"], books["deliveries"]
        say = self._terminal.say
        say()
        say(f"The books {'balance' if books['balanced'] else 'DO NOT BALANCE'}:")
        say(f"  events      {events['accepted']} accepted = {events['routed']} routed + {events['unrouted']} unrouted")
        states = ("delivered", "waiting", "held", "dead", "discarded")
        say(f"  deliveries  {owed['owed']} owed = " + " + ".join(f"{owed[state]} {state}" for state in states))

    def _look_around(self, watch: Watch, url: str) -> None:
        say = self._terminal.say
        say()
        say("From now on something comes in every few seconds.  Meanwhile:")
        say()
        say(f"  {url}/metrics        for Prometheus")
        say(f"  {url}/ready          whether it can take work")
        say(f"  {url}/api/v1/events  the API, with a token:")
        say()
        for line in (
            'curl -H "Authorization: Bearer $(cat secrets/api-token)" \\',
            f"  {url}/api/v1/events?limit=5",
            "sluicegate events list --limit 5",
            *([f"sluicegate events show {watch.latest}"] if watch.latest else []),
            "sluicegate dead-letters list",
            *([f"sluicegate dead-letters replay --destination {watch.dead} --dry-run"] if watch.dead else []),
            "sluicegate destinations list",
            "sluicegate token create --name me --role operator",
        ):
            say(f"    {line}")
        say()
        say("Ctrl-C stops all of it.")
        say()


def _signals(*numbers: signal.Signals) -> asyncio.Event:
    stop = asyncio.Event()
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _near(path: Path) -> Path:
    """As one would type it from here."""
    here = Path.cwd()
    return path.resolve().relative_to(here) if path.resolve().is_relative_to(here) else path.resolve()


def _activate() -> str:
    """How to get at `sluicegate` from another terminal, where it is not at hand."""
    activate = Path(sys.prefix) / "bin/activate"
    at_hand = shutil.which("sluicegate")
    if (at_hand and Path(at_hand).parent == activate.parent) or not activate.exists():
        return ""
    return f" && . {activate}"
