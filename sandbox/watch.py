"""Tells what happens to each event, as the API of the running program says it."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sandbox.program import Program
from sandbox.terminal import Fate, Terminal

LOOK = 0.1  # seconds between looks at what is under way
LOOK_AT_ALL = 1.0  # between looks for what came from elsewhere, and at what is dead or held
MOST = 100  # events that are watched; older ones are left to `sluicegate events show`

Json = Mapping[str, Any]


@dataclass
class Watched:
    """An event that is not over yet, and how much of its story has been told."""

    received_at: datetime
    subject: str
    tries: dict[str, int] = field(default_factory=dict)  # told, by destination
    states: dict[str, str] = field(default_factory=dict)  # told, by destination
    next_look: float = 0.0

    @classmethod
    def of(cls, event: Json) -> "Watched":
        return cls(datetime.fromisoformat(event["received_at"]), event["subject"] or "-")


class Watch:
    """Looks at every event that has something to come, and says what is new."""

    def __init__(self, program: Program, terminal: Terminal) -> None:
        self._program = program
        self._terminal = terminal
        self._subjects: dict[str, str] = {}  # of every event that was told
        self._watched: dict[str, Watched] = {}
        self.latest = ""  # the id of an event that is worth a look
        self.dead = ""  # the destination of a dead letter

    async def remember(self) -> None:
        """What earlier demos left is not told again, but what becomes of it is."""
        for found in await self._newest(200):
            self._subjects[found["id"]] = found["subject"] or "-"
            if any(delivery["state"] in {"waiting", "held", "dead"} for delivery in found["deliveries"]):
                event = await self._program.ask(f"/events/{found['id']}")
                self._watched[found["id"]] = watched = Watched.of(event)
                for delivery in event["deliveries"]:
                    watched.tries[delivery["destination"]] = len(delivery["attempts"])
                    watched.states[delivery["destination"]] = delivery["state"]

    async def accepted(self, id_: str) -> None:
        """This event is new: tell it, and everything that becomes of it."""
        event = await self._program.ask(f"/events/{id_}")
        if event is None or id_ in self._subjects:
            return
        watched = Watched.of(event)
        self._subjects[id_] = watched.subject
        if event["deliveries"]:
            self._watched[id_] = watched
            self.latest = id_
            self._terminal.happened(Fate.ACCEPTED, watched.subject, event["type"])
        else:
            self._terminal.happened(Fate.UNROUTED, watched.subject, f"{event['type']}: no route, kept")
        for oldest in list(self._watched)[:-MOST]:
            del self._watched[oldest]

    def subject(self, id_: str) -> str:
        return self._subjects.get(id_, "-")

    async def run(self) -> None:
        looked_at_all = time.monotonic()
        while True:
            await asyncio.sleep(LOOK)
            for id_, watched in list(self._watched.items()):
                if watched.next_look <= time.monotonic():
                    await self._look(id_, watched)
            if time.monotonic() - looked_at_all >= LOOK_AT_ALL:
                looked_at_all = time.monotonic()
                for found in reversed(await self._newest(20)):
                    await self.accepted(found["id"])

    async def _newest(self, limit: int) -> list[Json]:
        page = await self._program.ask("/events", limit=limit)
        return page["items"] if page else []

    async def _look(self, id_: str, watched: Watched) -> None:
        event = await self._program.ask(f"/events/{id_}")
        if event is None:
            return
        for delivery in event["deliveries"]:
            self._tell(id_, watched, delivery)
        states = {delivery["state"] for delivery in event["deliveries"]}
        if states <= {"delivered", "discarded"}:
            self._watched.pop(id_, None)
        watched.next_look = time.monotonic() + (LOOK if "waiting" in states else LOOK_AT_ALL)

    def _tell(self, id_: str, watched: Watched, delivery: Json) -> None:
        name, state, attempts = delivery["destination"], delivery["state"], delivery["attempts"]
        for attempt in attempts[watched.tries.get(name, 0) :]:
            latest = attempt is attempts[-1]
            match attempt["outcome"], state:
                case "delivered" | "duplicate", _:
                    self._delivered(watched, name, attempt)
                case _, "dead" if latest:
                    self.dead = name
                    self._dead(id_, watched, name, attempt)
                case _:
                    due = delivery["due_at"] if latest and state == "waiting" else None
                    self._retry(watched, name, attempt, due)
        if state != watched.states.get(name) and state in {"held", "discarded"}:
            fate = Fate.HELD if state == "held" else Fate.DISCARDED
            self._terminal.happened(fate, watched.subject, f"for {name}: {delivery['reason'] or 'no reason given'}")
        watched.tries[name], watched.states[name] = len(attempts), state

    def _delivered(self, watched: Watched, name: str, attempt: Json) -> None:
        ended = datetime.fromisoformat(attempt["at"]) + timedelta(milliseconds=attempt["took_ms"])
        after = _span(ended - watched.received_at)
        at_try = f" at try {attempt['number']}" if attempt["number"] > 1 else ""
        had_it = ", where it was already" if attempt["outcome"] == "duplicate" else ""
        self._terminal.happened(Fate.DELIVERED, watched.subject, f"to {name}{at_try} after {after}{had_it}")

    def _retry(self, watched: Watched, name: str, attempt: Json, due_at: str | None) -> None:
        again = ""
        if due_at is not None:
            due = max(datetime.fromisoformat(due_at) - datetime.now(UTC), timedelta(0))
            again = f"; again in {_span(due)}"
        self._terminal.happened(Fate.RETRY, watched.subject, f"{name}: {attempt['reason']}{again}")

    def _dead(self, id_: str, watched: Watched, name: str, attempt: Json) -> None:
        self._terminal.happened(
            Fate.DEAD,
            watched.subject,
            f"for {name}: {attempt['reason']}; when that is mended:",
            f"sluicegate dead-letters replay --event {id_} \\",
            f'    --reason "{name} takes it now"',
        )


def _span(length: timedelta) -> str:
    milliseconds = length / timedelta(milliseconds=1)
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"
