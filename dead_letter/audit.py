"""Who did what, when and why: written with the deed itself, never changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from asyncpg import Record

from outbox.database import Connection, Database
from outbox.page import Page, page, place_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Deed:
    """One action of a person, a token or the program."""

    id: int
    at: datetime
    actor: str
    action: str
    target: str
    reason: str
    detail: dict[str, Any]


async def note(
    connection: Connection, *, actor: str, action: str, target: str, reason: str, detail: Mapping[str, object]
) -> None:
    """Write down a deed, inside the transaction that does it: either both happened or neither."""
    await connection.execute(
        """
        INSERT INTO audit (actor, action, target, reason, detail)
        VALUES ($1, $2, $3, $4, $5)
        """,
        actor,
        action,
        target,
        reason,
        msgspec.json.encode(detail).decode(),
    )


class Audit:
    """What was done, to be read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(self, *, actor: str, action: str, target: str, reason: str) -> None:
        """A deed that changes nothing else here."""
        await self._database.execute(
            "INSERT INTO audit (actor, action, target, reason, detail) VALUES ($1, $2, $3, $4, '{}')",
            actor,
            action,
            target,
            reason,
        )

    async def deeds(
        self,
        *,
        actor: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[Deed]:
        """The newest first."""
        rows = await self._database.fetch(
            """
            SELECT id, at, actor, action, target, reason, detail
              FROM audit
             WHERE ($1::bigint IS NULL OR id < $1)
               AND ($2::text IS NULL OR actor = $2)
               AND ($3::text IS NULL OR action = $3)
               AND ($4::text IS NULL OR target = $4)
               AND ($5::timestamptz IS NULL OR at >= $5)
               AND ($6::timestamptz IS NULL OR at < $6)
             ORDER BY id DESC
             LIMIT $7
            """,
            place_of(cursor, int),
            actor,
            action,
            target,
            since,
            until,
            limit + 1,
        )
        return page(rows, limit, item=_deed, place=lambda row: row["id"])

    async def of_event(self, event: UUID) -> list[Deed]:
        """What people did with the deliveries of one event, the oldest first.

        Of a deed that concerned many deliveries, `detail` names the ones of this event only.
        """
        rows = await self._database.fetch(
            """
            SELECT id, at, actor, action, target, reason,
                   json_build_object('count', 1, 'deliveries', mine.deliveries) AS detail
              FROM audit
             CROSS JOIN LATERAL (
                   SELECT json_agg(delivery) AS deliveries
                     FROM json_array_elements_text(detail -> 'deliveries') AS delivery
                    WHERE starts_with(delivery, $1)) AS mine
             WHERE action = ANY($2::text[]) AND mine.deliveries IS NOT NULL
             ORDER BY id
            """,
            f"{event}/",
            ["dead-letters.replay", "dead-letters.discard", "destination.reassign", "destination.discard"],
        )
        return [_deed(row) for row in rows]


def _deed(row: Record) -> Deed:
    return Deed(
        id=row["id"],
        at=row["at"],
        actor=row["actor"],
        action=row["action"],
        target=row["target"],
        reason=row["reason"],
        detail=msgspec.json.decode(row["detail"]),
    )
