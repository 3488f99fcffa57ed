"""What the program has to say itself: written by the statement that changes a state, made an event of afterwards.

So it is told once, however many processes look: a state changes once, and what was written and not told yet is told by
whoever comes next, under a dedup key that the others would use too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from outbox.database import Database

AT_ONCE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """Something that an operator may want to hear; metadata only."""

    id: UUID
    at: datetime
    type: str
    subject: str
    facility: str | None
    data: Mapping[str, Any]


class Announcements:
    """Those that wait to be made events of, in their order."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def waiting(self) -> list[Announcement]:
        rows = await self._database.fetch(
            "SELECT id, at, type, subject, facility, data FROM announcements ORDER BY n LIMIT $1", AT_ONCE
        )
        return [
            Announcement(
                id=row["id"],
                at=row["at"],
                type=row["type"],
                subject=row["subject"],
                facility=row["facility"],
                data=msgspec.json.decode(row["data"]),
            )
            for row in rows
        ]

    async def told(self, announcements: Sequence[Announcement]) -> None:
        await self._database.execute(
            "DELETE FROM announcements WHERE id = ANY ($1::uuid[])", [a.id for a in announcements]
        )
