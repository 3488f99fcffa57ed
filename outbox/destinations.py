"""What a person does to a whole destination: hold it, and let it go again."""

from collections.abc import Collection, Sequence
from datetime import datetime
from difflib import get_close_matches

import msgspec

from outbox.database import Database
from outbox.store import DESTINATIONS


class UnknownDestinationError(LookupError):
    """There is no destination of that name in this database."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        close = get_close_matches(name, known, n=1)
        super().__init__(f'There is no destination "{name}"' + (f'; did you mean "{close[0]}"?' if close else "."))
        self.name = name


class Destinations:
    """Holds.

    A hold keeps deliveries where they are and touches none of them.  One that a person made ends when a person says
    so, or at the time that was given; it takes the place of one that the program made.  Each deed is written into
    the audit by the statement that does it, and told to the dispatchers after its commit.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def names(self) -> list[str]:
        """Every destination that this database has known."""
        rows = await self._database.fetch("SELECT name FROM destinations ORDER BY name")
        return [row["name"] for row in rows]

    async def require(self, name: str, *, configured: Collection[str]) -> None:
        """Nothing, if the configuration or the database knows it; else UnknownDestinationError."""
        if name not in configured and name not in (known := await self.names()):
            raise UnknownDestinationError(name, sorted({*configured, *known}))

    async def hold(self, name: str, *, until: datetime | None, reason: str, by: str) -> None:
        """Deliver nothing there any more, until then (None: until somebody releases it)."""
        held = await self._database.fetchval(
            """
            WITH held AS (
                UPDATE destinations
                   SET held_until = coalesce($2::timestamptz, 'infinity'), held_by = $4, held_reason = $3
                 WHERE name = $1
                RETURNING name
            ), noted AS (
                INSERT INTO audit (actor, action, target, reason, detail)
                SELECT $4, 'destination.hold', name, $3, $5::json
                  FROM held
            )
            SELECT name FROM held
            """,
            name,
            until,
            reason,
            by,
            msgspec.json.encode({"until": until}).decode(),
        )
        await self._tell(name, known=held is not None)

    async def release(self, name: str, *, by: str, reason: str) -> bool:
        """Deliver again, whoever held it; False if it was not held.  A back-off ends too: a person knows better."""
        row = await self._database.fetchrow(
            """
            WITH found AS (
                SELECT id, name, held_until, held_by, held_reason
                  FROM destinations
                 WHERE name = $1
                   FOR UPDATE
            ), released AS (
                UPDATE destinations
                   SET held_until = NULL, held_by = NULL, held_reason = NULL, not_before = NULL
                  FROM found
                 WHERE destinations.id = found.id
            ), noted AS (
                INSERT INTO audit (actor, action, target, reason, detail)
                SELECT $2, 'destination.release', name, $3,
                       json_build_object('held_by', held_by, 'held_reason', held_reason)
                  FROM found
                 WHERE held_until > now()
            )
            SELECT coalesce(held_until > now(), false) AS held FROM found
            """,
            name,
            by,
            reason,
        )
        await self._tell(name, known=row is not None)
        return row is not None and bool(row["held"])

    async def _tell(self, name: str, *, known: bool) -> None:
        if not known:
            raise UnknownDestinationError(name, await self.names())
        await self._database.execute("SELECT pg_notify($1, $2)", DESTINATIONS, name)
