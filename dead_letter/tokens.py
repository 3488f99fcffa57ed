"""Who may use the API: tokens, of which only a digest is kept."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from hmac import compare_digest
from secrets import token_hex, token_urlsafe

from dead_letter.audit import note
from outbox.database import Database


class Role(StrEnum):
    """What somebody is here for; what each may do stands in gateway/permissions.py."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    LEAD = "lead"
    ENGINEER = "engineer"
    AUDITOR = "auditor"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Whoever presents a token."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """A token as it can still be seen after it was made."""

    id: str
    name: str
    role: Role
    created_at: datetime


THE_PROGRAM = "program"  # who holds a destination by itself; nobody else may go by that name


class Tokens:
    """`sg_<id>_<secret>`: the id finds the row, the secret (256 bits) proves the holder.

    A secret of that size needs no slow hash: nobody guesses it from its SHA-256.
    Nothing is cached, so that a revoked token is refused at once.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, name: str, role: Role, *, by: str) -> str:
        """A new token.  This is the only time that it can be seen."""
        if name == THE_PROGRAM:
            raise ValueError(f"{name!r} is what the program calls itself in holds and in the audit")
        token, secret = token_hex(6), token_urlsafe(32)
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                INSERT INTO tokens (id, name, role, digest)
                VALUES ($1, $2, $3, $4)
                """,
                token,
                name,
                role,
                _digest(secret),
            )
            await note(
                connection,
                actor=by,
                action="token.create",
                target=name,
                reason="",
                detail={"id": token, "role": role},
            )
        return f"sg_{token}_{secret}"

    async def holder(self, token: str) -> Holder | None:
        """Who holds this token; None for one that we did not give out, or took back.

        An unknown id takes the same way as a wrong secret, so that neither can be told from the other.
        """
        prefix, _, rest = token.partition("_")
        identity, _, secret = rest.partition("_")
        if prefix != "sg" or not token.isascii():
            return None
        row = await self._database.fetchrow(
            """
            SELECT name, role, digest
              FROM tokens
             WHERE id = $1
            """,
            identity[:64],
        )
        if not compare_digest(_digest(secret), row["digest"] if row else _digest("")) or row is None:
            return None
        return Holder(name=row["name"], role=Role(row["role"]))

    async def all(self) -> list[TokenRecord]:
        """Every token that is good, by name."""
        rows = await self._database.fetch(
            """
            SELECT id, name, role, created_at
              FROM tokens
             ORDER BY name, created_at
            """
        )
        return [
            TokenRecord(id=row["id"], name=row["name"], role=Role(row["role"]), created_at=row["created_at"])
            for row in rows
        ]

    async def revoke(self, token: str, *, by: str) -> bool:
        """Take a token back, by its id; False if there is none."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                DELETE FROM tokens
                 WHERE id = $1
                RETURNING name, role
                """,
                token,
            )
            if row is None:
                return False
            await note(
                connection,
                actor=by,
                action="token.revoke",
                target=row["name"],
                reason="",
                detail={"id": token, "role": row["role"]},
            )
        return True


def _digest(secret: str) -> bytes:
    return sha256(secret.encode()).digest()
