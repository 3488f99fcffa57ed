"""When each secret of a source last verified something: by where it comes from, never by what it is."""

from collections.abc import Mapping
from datetime import datetime

from outbox.database import Database

Origin = tuple[str, str]
"""A source, and where one of its secrets comes from: `env:NAME`, `file:PATH`."""


class SecretUses:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, uses: Mapping[Origin, datetime]) -> None:
        """What a door has seen; an older word than the one that is known changes nothing."""
        origins = sorted(uses)
        await self._database.execute(
            """
            INSERT INTO secret_uses AS u (source, origin, at)
            SELECT source, origin, at
              FROM unnest($1::text[], $2::text[], $3::timestamptz[]) AS told (source, origin, at)
                ON CONFLICT (source, origin) DO UPDATE SET at = excluded.at
             WHERE u.at < excluded.at
            """,
            [source for source, _ in origins],
            [origin for _, origin in origins],
            [uses[origin] for origin in origins],
        )

    async def all(self) -> Mapping[Origin, datetime]:
        rows = await self._database.fetch("SELECT source, origin, at FROM secret_uses")
        return {(row["source"], row["origin"]): row["at"] for row in rows}
